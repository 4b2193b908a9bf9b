"""Grammar of the four languages against sentences written by hand."""

import re

import pytest

from internvl_jax.data import conversation, questions, scenes, text

STAR = ((("red", "star", "large"),), None)
PAIR = ((("green", "cross", "small"), ("white", "circle", "large")), "left")
STACK = ((("orange", "ring", "large"), ("black", "triangle", "large")), "above")


@pytest.mark.parametrize(
    "description, language, expected",
    [
        (STAR, "en", "a large red star"),
        (STAR, "zh", "一颗红色的大星星"),
        (STAR, "ko", "큰 빨간 별"),
        (STAR, "es", "una estrella roja grande"),
        (PAIR, "en", "a small green cross to the left of a large white circle"),
        (PAIR, "zh", "一个绿色的小十字在一个白色的大圆形的左边"),
        (PAIR, "ko", "큰 하얀 원 왼쪽에 작은 초록색 십자가가 있다"),
        (PAIR, "es", "una cruz verde pequeña a la izquierda de un círculo blanco grande"),
        (STACK, "en", "a large orange ring above a large black triangle"),
        (STACK, "zh", "一个橙色的大圆环在一个黑色的大三角形的上面"),
        (STACK, "ko", "큰 검은 삼각형 위에 큰 주황색 고리가 있다"),
        (STACK, "es", "un anillo naranja grande encima de un triángulo negro grande"),
    ],
)
def test_canonical_captions(description, language, expected):
    assert text.scene_captions(description, language)[0] == expected


@pytest.mark.parametrize(
    "description, language, expected",
    [
        (STAR, "en", "there is a large red star in the picture"),
        (STAR, "ko", "그림에 큰 빨간 별이 있다"),
        (STAR, "es", "hay una estrella roja grande en la imagen"),
        (STAR, "zh", "图中有一颗红色的大星星"),
        (PAIR, "en", "a large white circle to the right of a small green cross"),
        (PAIR, "ko", "작은 초록색 십자가 오른쪽에 큰 하얀 원이 있다"),
        (STACK, "es", "un triángulo negro grande debajo de un anillo naranja grande"),
    ],
)
def test_other_captions(description, language, expected):
    assert expected in text.scene_captions(description, language)


def test_english_article_follows_the_sound():
    assert text.noun("orange", "star", None, "en") == "an orange star"
    assert text.noun("orange", "star", "small", "en") == "a small orange star"


@pytest.mark.parametrize(
    "word, kind, expected",
    [
        ("별", "이", "별이"),
        ("고리", "이", "고리가"),
        ("원", "은", "원은"),
        ("십자가", "은", "십자가는"),
        ("삼각형", "을", "삼각형을"),
        ("고리", "을", "고리를"),
    ],
)
def test_korean_particles(word, kind, expected):
    assert text.particle(word, kind) == expected


@pytest.mark.parametrize("color", scenes.COLORS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_spanish_agrees_in_gender(color, shape):
    words = text.noun(color, shape, "small", "es").split()
    feminine = words[0] == "una"
    assert feminine == (shape in ("star", "cross"))
    assert words[-1] == ("pequeña" if feminine else "pequeño")
    assert words[2].endswith(("a", "e", "l") if feminine else ("o", "e", "l", "naranja"))


def test_digit_captions():
    assert text.digit_captions(7, "en")[0] == "a photo of the digit seven"
    assert text.digit_captions(7, "zh")[0] == "数字七的照片"
    assert text.digit_captions(7, "ko")[0] == "숫자 칠의 사진"
    assert text.digit_captions(7, "es")[0] == "una foto del número siete"


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_class_prompts_are_worded_like_captions(language):
    prompts = text.class_prompts(language)
    assert len(prompts) == 48 and len({p for row in prompts for p in row}) == 48 * len(prompts[0])
    for (color, shape), row in zip(scenes.ALL_PAIRS, prompts, strict=True):
        for size in scenes.SIZES:
            captions = text.scene_captions((((color, shape, size),), None), language)
            assert set(captions) <= set(row)
    assert [len(set(row)) for row in text.digit_prompts(language)] == [2] * 10


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_captions_tell_descriptions_apart_and_survive_cleaning(language):
    descriptions = {scenes.scene("train", i).description for i in range(600)}
    captions = [text.scene_captions(d, language) for d in descriptions]
    assert len({c[0] for c in captions}) == len(descriptions)
    for caption in (c for group in captions for c in group):
        assert conversation.clean_caption(caption) == caption
        assert not re.search("[A-Z{}]", caption)


def test_unknown_language_is_named():
    with pytest.raises(ValueError, match="no words for language 'fr'"):
        text.noun("red", "star", None, "fr")


@pytest.mark.parametrize(
    "language, expected",
    [
        ("en", ("is the green cross to the left of the white circle?", "yes")),
        ("zh", ("绿色十字在白色圆形的左边吗?", "是")),
        ("ko", ("초록색 십자가는 하얀 원 왼쪽에 있는가?", "예")),
        ("es", ("¿está la cruz verde a la izquierda del círculo blanco?", "sí")),
        ("en", ("what is on the right?", "white circle")),
        ("zh", ("十字是什么颜色?", "绿色")),
        ("ko", ("원은 무슨 색인가?", "하얀색")),
        ("es", ("¿de qué color es la cruz?", "verde")),
        ("es", ("¿qué hay a la derecha?", "círculo blanco")),
    ],
)
def test_questions_about_two_objects(language, expected):
    assert expected in questions.about_scene(PAIR, language)


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_answers_agree_with_the_scene(language):
    yes, no = questions.YES_NO[language]
    balance = {yes: 0, no: 0}
    for index in range(300):
        description = scenes.scene("train", index).description
        pairs = questions.about_scene(description, language)
        asked = [question for question, _ in pairs]
        assert len(set(asked)) == len(asked)
        for _, answer in pairs:
            if answer in balance:
                balance[answer] += 1
    assert balance[yes] == balance[no]


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_what_is_said_to_be_absent_is_absent_and_not_held_out(language):
    no = questions.YES_NO[language][1]
    phrases = {
        text.noun(c, s, size, language): (c, s)
        for c, s in scenes.ALL_PAIRS
        for size in scenes.SIZES
    }
    for index in range(200):
        description = scenes.scene("train", index).description
        question = questions.about_scene(description, language)[2]
        assert question[1] == no
        named = max((p for p in phrases if p in question[0]), key=len)
        assert phrases[named] not in {item[:2] for item in description[0]}
        assert phrases[named] not in scenes.HELD_OUT_PAIRS


def test_questions_about_digits():
    assert questions.about_digit(7, "en")[0] == ("which digit is this?", "seven")
    for digit in range(10):
        (_, name), (yes, _), (no, _) = questions.about_digit(digit, "es")
        assert name in yes and name not in no.replace("número", "")
