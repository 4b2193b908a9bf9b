"""Words of the embedded data sets: noun phrases, captions and class prompts in four languages.

Every sentence comes from a template with the grammar of its language: Spanish articles and
adjectives agree with the noun, Korean particles follow the final consonant, Chinese nouns carry
their measure word, and the English article follows the next sound. All text is lower-case and
without the punctuation that caption cleaning removes, so cleaning leaves it unchanged.
"""

import functools

from internvl_jax.data import scenes

LANGUAGES = ("en", "zh", "ko", "es")
LANGUAGE_NAMES = {"en": "English", "zh": "Chinese", "ko": "Korean", "es": "Spanish"}


def _named(keys, words: str) -> dict[str, str]:
    return dict(zip(keys, words.split(), strict=True))


COLORS = {
    "en": _named(scenes.COLORS, "red orange yellow green blue purple black white"),
    "zh": _named(scenes.COLORS, "红色 橙色 黄色 绿色 蓝色 紫色 黑色 白色"),
    "ko": _named(scenes.COLORS, "빨간 주황색 노란 초록색 파란 보라색 검은 하얀"),
    # Masculine and feminine.
    "es": {
        "red": ("rojo", "roja"),
        "orange": ("naranja", "naranja"),
        "yellow": ("amarillo", "amarilla"),
        "green": ("verde", "verde"),
        "blue": ("azul", "azul"),
        "purple": ("morado", "morada"),
        "black": ("negro", "negra"),
        "white": ("blanco", "blanca"),
    },
}
# Names of the colours where they stand alone, as in an answer.
COLOR_NAMES = {
    "en": COLORS["en"],
    "zh": COLORS["zh"],
    "ko": _named(scenes.COLORS, "빨간색 주황색 노란색 초록색 파란색 보라색 검은색 하얀색"),
    "es": {color: forms[0] for color, forms in COLORS["es"].items()},
}
SHAPES = {
    "en": _named(scenes.SHAPES, "circle square triangle star ring cross"),
    "zh": _named(scenes.SHAPES, "圆形 正方形 三角形 星星 圆环 十字"),
    "ko": _named(scenes.SHAPES, "원 정사각형 삼각형 별 고리 십자가"),
    "es": _named(scenes.SHAPES, "círculo cuadrado triángulo estrella anillo cruz"),
}
_SIZES = {
    "en": {"large": "large", "small": "small"},
    "zh": {"large": "大", "small": "小"},
    "ko": {"large": "큰", "small": "작은"},
    "es": {"large": ("grande", "grande"), "small": ("pequeño", "pequeña")},
}
_FEMININE = {"star", "cross"}

DIGITS = {
    "en": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("零", "一", "二", "三", "四", "五", "六", "七", "八", "九"),
    "ko": ("영", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구"),
    "es": ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"),
}

# The first template of each list gives the canonical caption.
_SINGLE = {
    "en": ("{a}", "a photo of {a}", "there is {a} in the picture"),
    "zh": ("{a}", "{a}的照片", "图中有{a}"),
    "ko": ("{a}", "{a}의 사진", "그림에 {a:이} 있다"),
    "es": ("{a}", "una foto de {a}", "hay {a} en la imagen"),
}
_PAIR = {
    "left": {
        "en": ("{a} to the left of {b}", "{b} to the right of {a}"),
        "zh": ("{a}在{b}的左边", "{b}在{a}的右边"),
        "ko": ("{b} 왼쪽에 {a:이} 있다", "{a} 오른쪽에 {b:이} 있다"),
        "es": ("{a} a la izquierda de {b}", "{b} a la derecha de {a}"),
    },
    "above": {
        "en": ("{a} above {b}", "{b} below {a}"),
        "zh": ("{a}在{b}的上面", "{b}在{a}的下面"),
        "ko": ("{b} 위에 {a:이} 있다", "{a} 아래에 {b:이} 있다"),
        "es": ("{a} encima de {b}", "{b} debajo de {a}"),
    },
}
_DIGIT = {
    "en": ("a photo of the digit {n}", "the handwritten digit {n}"),
    "zh": ("数字{n}的照片", "手写的数字{n}"),
    "ko": ("숫자 {n}의 사진", "손으로 쓴 숫자 {n}"),
    "es": ("una foto del número {n}", "el número {n} escrito a mano"),
}
_PARTICLES = {"이": ("이", "가"), "은": ("은", "는"), "을": ("을", "를")}


def particle(word: str, kind: str) -> str:
    """Adds the Korean subject (이), topic (은) or object (을) particle in the form that fits.

    The form depends on whether the last syllable ends in a consonant: Hangul syllables stand in
    Unicode in blocks of 28, the first of each block being the one without a final consonant.
    """
    closed = (ord(word[-1]) - 0xAC00) % 28 != 0
    return word + _PARTICLES[kind][0 if closed else 1]


class Phrase(str):
    """A noun phrase whose format code names the Korean particle to append."""

    def __format__(self, code):
        return particle(self, code) if code else str(self)


@functools.cache
def noun(color: str, shape: str, size: str | None, language: str, article: bool = True) -> str:
    """The phrase for one object, e.g. "a large red star", "una estrella roja grande".

    Without `article` English and Spanish drop it and Chinese its numeral and measure word.
    """
    if language not in LANGUAGES:
        raise ValueError(f"no words for language {language!r}; there are {', '.join(LANGUAGES)}")
    if language == "en":
        words = " ".join(word for word in (size, color, shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else words
    name, tint = SHAPES[language][shape], COLORS[language][color]
    extent = _SIZES[language][size] if size else ""
    if language == "zh":
        counter = {"star": "一颗"}.get(shape, "一个") if article else ""
        return f"{counter}{tint}的{extent}{name}" if extent else f"{counter}{tint}{name}"
    if language == "ko":
        return " ".join(word for word in (extent, tint, name) if word)
    gender = 1 if shape in _FEMININE else 0
    words = (name, tint[gender]) + ((extent[gender],) if extent else ())
    return " ".join((("un", "una")[gender], *words) if article else words)


def definite(color: str | None, shape: str, language: str) -> str:
    """The phrase for an object known from the picture: "the red star", "la estrella roja"."""
    words = SHAPES[language][shape] if color is None else noun(color, shape, None, language, False)
    if language == "en":
        return f"the {words}"
    if language == "es":
        return f"{'la' if shape in _FEMININE else 'el'} {words}"
    return words


@functools.cache
def scene_captions(description: tuple, language: str) -> tuple[str, ...]:
    """All captions of a scene description (`Scene.description`), the canonical one first.

    Captions of a single object also occur without its size, as class prompts are worded.
    """
    objects, relation = description
    phrases = [Phrase(noun(*item, language)) for item in objects]
    if relation is None:
        color, shape, _ = objects[0]
        bare = Phrase(noun(color, shape, None, language))
        templates = _SINGLE[language]
        return (*(t.format(a=phrases[0]) for t in templates), templates[1].format(a=bare))
    first, second = phrases
    return tuple(t.format(a=first, b=second) for t in _PAIR[relation][language])


@functools.cache
def digit_captions(digit: int, language: str) -> tuple[str, ...]:
    """Captions of a handwritten digit, the canonical one first."""
    return tuple(t.format(n=DIGITS[language][digit]) for t in _DIGIT[language])


def class_prompts(language: str) -> list[list[str]]:
    """Prompts of the 48 colour-shape classes in the order of scenes.ALL_PAIRS.

    Every class has the same number of prompts: each template with the object large, small and
    without a size.
    """
    return [
        [
            template.format(a=Phrase(noun(color, shape, size, language)))
            for size in (None, *scenes.SIZES)
            for template in _SINGLE[language]
        ]
        for color, shape in scenes.ALL_PAIRS
    ]


def digit_prompts(language: str) -> list[list[str]]:
    """Prompts of the ten digit classes, zero to nine."""
    return [list(digit_captions(digit, language)) for digit in range(10)]
