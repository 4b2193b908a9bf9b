"""Text rules of the InternVL recipes: caption cleaning, prompts, chat templates, label masks.

Everything here is exact to the released program where it has one; `tokenizer` is a
`tokenizer.Tokenizer`. Label arrays hold IGNORE where no loss is taken.
"""

import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from internvl_jax.data import text
from internvl_jax.data.chat_tokenizer import IMAGE_MARK, IMAGE_TOKEN, ChatTokenizer
from internvl_jax.data.templates import TEMPLATES
from internvl_jax.data.tokenizer import PAD_ID, padded

IGNORE = -100
SUMMARIZE = "summarize:"
GENERATION_PROMPTS = {code: f"{name} caption:" for code, name in text.LANGUAGE_NAMES.items()}
MULTILINGUAL = "mul"  # ISO 639-2 for a source that mixes languages and does not say which is which
_MULTILINGUAL_PROMPT = "caption:"

_MAX_WORDS = 50


@functools.lru_cache(1 << 16)
def clean_caption(caption: str) -> str:
    """The released rule: lower case, .!"()*#:;~ become spaces, single spaces, 50 words.

    Letters outside ASCII keep their identity: only their case changes, and full-width marks stay.
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:_MAX_WORDS])


def contrastive_text(caption: str) -> str:
    """The text tower's input: "summarize:" joined to the cleaned caption without a space."""
    return SUMMARIZE + clean_caption(caption)


@functools.lru_cache(1 << 16)
def captioning_example(tokenizer, caption: str, language: str, length: int):
    """Prompt, cleaned caption and end of text for the captioning loss: (ids, labels) [length]."""
    several = language == MULTILINGUAL
    prompt = _MULTILINGUAL_PROMPT if several else GENERATION_PROMPTS[language]
    ids, _, labels = captioning_ids(tokenizer, prompt, clean_caption(caption), length)
    ids.flags.writeable = labels.flags.writeable = False  # shared by the cache
    return ids, labels


def captioning_ids(
    tokenizer, prompt: str, caption: str, length: int, *, parse_special: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, labels), each int32 [length], of a prompt and the caption after it.

    The two are tokenised apart. No loss falls on the prompt except on its last token: the released
    program masks one position fewer than the prompt has. Nor does it on an unknown piece, whose id
    is that of the padding.
    """
    first = tokenizer.encode(prompt, parse_special=parse_special)
    room = length - len(first)
    body = tokenizer.encode(
        caption, bos=False, eos=True, length=room, parse_special=parse_special
    )
    (ids,), (mask,) = padded([first + body], length)
    learnt = (np.arange(length) >= len(first) - 1) & (ids != PAD_ID)
    return ids, mask, np.where(learnt, ids, IGNORE)


# Templates that can be trained on: those of the others need a tokenizer with their special tokens.
TRAINABLE = {
    name: layout for name, layout in TEMPLATES.items() if layout is None or layout.end == "</s>"
}


def encode_chat(tokenizer, name, rounds, num_image_tokens: int | Sequence[int]):
    """Tokenises rounds of (question, answer) with `<image>` marks: (ids, labels), two lists.

    Every mark becomes `num_image_tokens` times IMAGE_TOKEN (of a sequence, the next of its numbers,
    and nothing after the last). Loss falls on the assistant's text
    and the end of text after it; with "plain" on the caption and its line break. A last answer
    of None leaves the prompt open for generation. Text of users never yields special ids. A
    `ChatTokenizer` has its own template and serves prompts alone: no label is learnt.

    The pieces between marks and turns are tokenised one by one, as the released program does,
    so each starts with the tokenizer's leading space.
    """
    if isinstance(tokenizer, ChatTokenizer):
        ids = tokenizer.encode_chat(rounds, num_image_tokens)
        return ids, [IGNORE] * len(ids)
    if name not in TRAINABLE:
        raise ValueError(f"no ids for chat template {name!r}; choose from {', '.join(TRAINABLE)}")
    layout = TRAINABLE[name]
    ids, labels = [tokenizer.bos_id], [IGNORE]
    several = not isinstance(num_image_tokens, int)
    counts = iter(num_image_tokens) if several else itertools.repeat(num_image_tokens)

    def add(segment, learn=False):
        for k, piece in enumerate(segment.split(IMAGE_MARK)):
            tokens = [IMAGE_TOKEN] * next(counts, 0) if k else []
            tokens += tokenizer.encode(piece, bos=False)
            ids.extend(tokens)
            labels.extend(tokens if learn else [IGNORE] * len(tokens))

    if layout is None:
        (_, caption), *_ = rounds
        add(IMAGE_MARK)
        if caption is not None:
            add(caption + "\n", learn=True)
        return ids, labels
    start = layout.start()
    for question, answer in rounds:
        add(start + layout.question(question))
        start = ""
        if answer is not None:
            # A picture in an answer would be learnt as text, so its mark is taken out.
            add(answer.replace(IMAGE_MARK, ""), learn=True)
            ids.append(tokenizer.eos_id)
            labels.append(tokenizer.eos_id)
    return ids, labels


def image_first(question: str) -> str:
    """Moves the image mark of a question to its front, or puts one there."""
    return f"{IMAGE_MARK}\n" + question.replace(IMAGE_MARK, "").strip()
