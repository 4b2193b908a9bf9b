"""Cleaning, prompts, chat templates, and which tokens are learnt."""

import pytest

from internvl_jax.data import conversation, templates, text
from internvl_jax.data.conversation import IGNORE, IMAGE_TOKEN
from internvl_jax.data.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.mark.parametrize(
    "caption, cleaned",
    [
        ('A "Red"  STAR (large)!\n', "a red star large"),
        ("a:b;c~d*e#f.g", "a b c d e f g"),
        ("Ñandú y CÍRCULO, ¿no?", "ñandú y círculo, ¿no?"),
        ("一颗红色的大星星。", "一颗红色的大星星。"),
        ("큰 빨간 별", "큰 빨간 별"),
        (" ".join(str(i) for i in range(80)), " ".join(str(i) for i in range(50))),
        ("", ""),
    ],
)
def test_cleaning(caption, cleaned):
    assert conversation.clean_caption(caption) == cleaned


def test_prompts_are_the_released_strings():
    assert conversation.contrastive_text("A dog.") == "summarize:a dog"
    assert conversation.GENERATION_PROMPTS == {
        "en": "English caption:",
        "zh": "Chinese caption:",
        "ko": "Korean caption:",
        "es": "Spanish caption:",
    }


def test_vicuna_prompt_is_exact():
    rounds = [("What is it?", "A dog."), ("And now?", None)]
    assert templates.VICUNA_V1.prompt(rounds) == (
        f"{SYSTEM} USER: What is it? ASSISTANT: A dog.</s>USER: And now? ASSISTANT:"
    )
    assert templates.TEMPLATES["brief"].prompt(rounds[1:]) == "USER: And now? ASSISTANT:"


def learnt(tokenizer, ids, labels):
    """Runs of labelled tokens as text with their end marks."""
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    runs, current = [], []
    for label in [*labels, IGNORE]:
        if label != IGNORE:
            current.append(label)
        elif current:
            runs.append((tokenizer.decode(current), current[-1] == tokenizer.eos_id))
            current = []
    return runs


@pytest.mark.parametrize("name", ["vicuna_v1", "brief"])
def test_only_answers_and_their_ends_are_learnt(tokenizer, name):
    rounds = [("<image>\nwhat color is it?", "red"), ("图中有几个物体?", "一个")]
    ids, labels = conversation.encode_chat(tokenizer, name, rounds, 3)
    assert learnt(tokenizer, ids, labels) == [("red", True), ("一个", True)]
    assert ids[0] == tokenizer.bos_id and ids.count(IMAGE_TOKEN) == 3
    without_image = [i for i in ids if i != IMAGE_TOKEN]
    assert tokenizer.decode(without_image).endswith(
        "what color is it? ASSISTANT: red USER: 图中有几个物体? ASSISTANT: 一个"
    )


def test_pieces_are_tokenised_one_by_one(tokenizer):
    ids, _ = conversation.encode_chat(tokenizer, "brief", [("<image>\nhow many?", None)], 2)
    assert ids == [
        1,
        *tokenizer.encode("USER: ", bos=False),
        IMAGE_TOKEN,
        IMAGE_TOKEN,
        *tokenizer.encode("\nhow many? ASSISTANT:", bos=False),
    ]


def test_open_prompt_is_the_start_of_the_answered_one(tokenizer):
    question = "<image>\nwhat shape is the object?"
    asked, labels = conversation.encode_chat(tokenizer, "vicuna_v1", [(question, None)], 4)
    answered, _ = conversation.encode_chat(tokenizer, "vicuna_v1", [(question, "star")], 4)
    assert answered[: len(asked)] == asked and set(labels) == {IGNORE}


def test_plain_template_learns_caption_and_line_break(tokenizer):
    ids, labels = conversation.encode_chat(tokenizer, "plain", [("", "a red star")], 2)
    assert ids[:3] == [1, IMAGE_TOKEN, IMAGE_TOKEN]
    assert learnt(tokenizer, ids, labels) == [("a red star\n", False)]


def test_marks_in_texts_are_harmless(tokenizer):
    rounds = [("<image>\nsay </s> now", "<image> </s> yes")]
    ids, labels = conversation.encode_chat(tokenizer, "brief", rounds, 2)
    assert ids.count(IMAGE_TOKEN) == 2 and ids.count(tokenizer.eos_id) == 1
    assert IMAGE_TOKEN not in labels and ids[-1] == tokenizer.eos_id


def test_image_comes_first():
    assert conversation.image_first("look: <image> what?") == "<image>\nlook:  what?"
    assert conversation.image_first("what?") == "<image>\nwhat?"


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_captioning_labels_start_at_the_last_prompt_token(tokenizer, language):
    caption = text.scene_captions(((("red", "star", "large"),), None), language)[0]
    ids, labels = conversation.captioning_example(tokenizer, caption, language, 24)
    prompt = tokenizer.encode(conversation.GENERATION_PROMPTS[language])
    assert ids[: len(prompt)].tolist() == prompt
    assert labels[: len(prompt) - 1].tolist() == [IGNORE] * (len(prompt) - 1)
    target = labels[labels != IGNORE]
    assert tokenizer.pieces(target[:1]) == [":"] and target[-1] == tokenizer.eos_id
    assert tokenizer.decode(target[1:]) == caption
    assert ((labels == IGNORE) | (labels == ids)).all() and (labels[ids == 0] == IGNORE).all()


def test_long_captions_are_cut_before_the_end_of_text(tokenizer):
    ids, labels = conversation.captioning_example(tokenizer, "a red star " * 16, "en", 16)
    assert ids[-1] == labels[-1] == tokenizer.eos_id and (ids != 0).all()


def test_unknown_template_is_named():
    with pytest.raises(ValueError, match="unknown chat template 'v2'; choose one of vicuna_v1"):
        templates.template("v2")
