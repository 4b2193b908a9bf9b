"""Text rules of the InternVL recipes: caption cleaning, prompts, chat templates, label masks.

Everything here is exact to the released program where it has one; `tokenizer` is a
`tokenizer.Tokenizer`. Label arrays hold IGNORE where no loss is taken.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from internvl_jax.data import text

IGNORE = -100
IMAGE_TOKEN = -200
IMAGE_MARK = "<image>"
SUMMARIZE = "summarize:"
GENERATION_PROMPTS = {code: f"{name} caption:" for code, name in text.LANGUAGE_NAMES.items()}

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
    """Prompt, caption and end of text for the captioning loss: (ids, labels), int32 [length].

    The prompt and the caption are tokenised apart. No loss falls on the prompt except on its
    last token: the released program masks one position fewer than the prompt has.
    """
    prompt = tokenizer.encode(GENERATION_PROMPTS[language])
    body = tokenizer.encode(
        clean_caption(caption), bos=False, eos=True, length=length - len(prompt)
    )
    ids = np.zeros(length, np.int32)
    labels = np.full(length, IGNORE, np.int32)
    stop = len(prompt) + len(body)
    ids[:stop] = prompt + body
    labels[len(prompt) - 1 : stop] = ids[len(prompt) - 1 : stop]
    ids.flags.writeable = labels.flags.writeable = False  # shared by the cache
    return ids, labels


@dataclasses.dataclass(frozen=True)
class Template:
    """Layout of a chat: `system`, then per round the user's and the assistant's text.

    system: text before the first round, or ""; user, assistant: names before each turn;
    separator: text after the system message and after a user's turn.
    """

    system: str
    user: str
    assistant: str
    separator: str

    def prompt(self, rounds: Sequence[tuple[str, str | None]]) -> str:
        """Renders rounds of (question, answer); a last answer of None asks for one."""
        result = self.system + self.separator if self.system else ""
        for question, answer in rounds:
            result += f"{self.user}: {question}{self.separator}{self.assistant}:"
            if answer is not None:
                result += f" {answer}</s>"
        return result


VICUNA_V1 = Template(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    user="USER",
    assistant="ASSISTANT",
    separator=" ",
)
# The same turns without the system message: for small models with short contexts.
BRIEF = dataclasses.replace(VICUNA_V1, system="")
TEMPLATES = {"vicuna_v1": VICUNA_V1, "brief": BRIEF, "plain": None}


def template(name: str) -> Template | None:
    """The named template; "plain" is None: image, caption and a line break, without turns."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_chat(tokenizer, name, rounds, num_image_tokens: int):
    """Tokenises rounds of (question, answer) with `<image>` marks: (ids, labels), two lists.

    Every mark becomes `num_image_tokens` times IMAGE_TOKEN. Loss falls on the assistant's text
    and the end of text after it; with "plain" on the caption and its line break. A last answer
    of None leaves the prompt open for generation. Text of users never yields special ids.

    The pieces between marks and turns are tokenised one by one, as the released program does,
    so each starts with the tokenizer's leading space.
    """
    layout = template(name)
    ids, labels = [tokenizer.bos_id], [IGNORE]

    def add(segment, learn=False):
        for k, piece in enumerate(segment.split(IMAGE_MARK)):
            tokens = [IMAGE_TOKEN] * num_image_tokens if k else []
            tokens += tokenizer.encode(piece, bos=False)
            ids.extend(tokens)
            labels.extend(tokens if learn else [IGNORE] * len(tokens))

    if layout is None:
        (_, caption), *_ = rounds
        add(IMAGE_MARK)
        if caption is not None:
            add(caption + "\n", learn=True)
        return ids, labels
    system = layout.system + layout.separator if layout.system else ""
    for question, answer in rounds:
        add(f"{system}{layout.user}: {question}{layout.separator}{layout.assistant}:")
        system = ""
        if answer is not None:
            # A picture in an answer would be learnt as text, so its mark is taken out.
            add(answer.replace(IMAGE_MARK, ""), learn=True)
            ids.append(tokenizer.eos_id)
            labels.append(tokenizer.eos_id)
    return ids, labels


def image_first(question: str) -> str:
    """Moves the image mark of a question to its front, or puts one there."""
    return f"{IMAGE_MARK}\n" + question.replace(IMAGE_MARK, "").strip()
