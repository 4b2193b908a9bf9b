"""K: ids, masks and labels of the tokenizer's call styles, and rendered chat prompts."""

import re
from dataclasses import replace

import numpy as np
import pytest

from internvl_jax.data import conversation, templates
from internvl_jax.data.tokenizer import Tokenizer, padded
from tests.golden import cases

PROMPT = "English caption:"


@pytest.mark.parametrize(**cases.parameters("K"))
def test_text(case):
    if "prompts" in case.info:
        prompts(case.info)
        return
    tokenizer = Tokenizer(case.path / "tokenizer.model")
    assert tokenizer.vocab_size == case.info["vocab_size"]
    for name, recorded in case.info["cases"].items():
        style = re.sub(r"_?\d+", "", name)
        assert style in STYLES, f"unknown call style {name}"
        STYLES[style](tokenizer, case.info["texts"], recorded, case.info["cases"])


def prompts(info):
    rounds = [tuple(turn) for turn in info["conversation"]]
    for name, recorded in info["prompts"].items():
        layout = replace(templates.template(name), system="SYS")
        assert layout.prompt(rounds) == recorded["prompt"], name
        assert layout.end == recorded["sep"] and layout.stop == recorded["stop"], name


def batch(tokenizer, texts, recorded, *, prefix="", eos=True, side="right", cut=True):
    """Ids and mask, each row cut and padded to the recorded length."""
    length = len(recorded["ids"][0])
    rows = [
        tokenizer.encode(prefix + t, eos=eos, length=length if cut else None, parse_special=True)
        for t in texts
    ]
    ids, mask = padded(rows, length if cut else None, side)
    assert ids.tolist() == recorded["ids"]
    if "mask" in recorded:
        assert mask.tolist() == recorded["mask"]


def clip(tokenizer, texts, recorded, _):
    texts = [recorded["text"]] if "text" in recorded else texts
    batch(tokenizer, texts, recorded, prefix="summarize:")


def captioning(tokenizer, texts, recorded, _):
    for text, row in zip(texts, recorded["rows"], strict=True):
        result = conversation.captioning_ids(
            tokenizer, PROMPT, text, len(row["ids"]), parse_special=True
        )
        for name, array in zip(("ids", "mask", "labels"), result, strict=True):
            assert array.tolist() == row[name], (text, name)


def raw(tokenizer, texts, recorded, _):
    assert [tokenizer.encode(text, parse_special=True) for text in texts] == recorded["ids"]


def pieces(tokenizer, texts, recorded, _):
    tokens = [tokenizer.tokenize(text, parse_special=True) for text in texts]
    assert tokens == recorded["tokens"]


def decode(tokenizer, texts, recorded, others):
    assert [tokenizer.decode(ids) for ids in others["raw"]["ids"]] == recorded["text"]


def caption_prompt(tokenizer, texts, recorded, _):
    assert tokenizer.encode(PROMPT) == recorded["ids"]


def left_padded(tokenizer, texts, recorded, _):
    count = len(recorded["ids"])
    batch(tokenizer, texts[:count], recorded, eos=False, side="left", cut=False)


STYLES = {
    "clip_max": clip,
    "clip_longest": clip,
    "clip_single": clip,
    "clip_max_noprefix": lambda t, texts, recorded, _: batch(t, texts, recorded),
    "train_caption": lambda t, texts, recorded, _: batch(t, texts, recorded),
    "train_summarize": lambda t, x, recorded, _: batch(t, x, recorded, prefix="summarize:"),
    "train_itg": captioning,
    "caption_prompt": caption_prompt,
    "raw": raw,
    "pieces": pieces,
    "decode": decode,
    "left_padded": left_padded,
}


def test_masks_are_where_ids_are():
    ids, mask = padded([[5, 0, 6], [7]], side="left")
    assert ids.tolist() == [[5, 0, 6], [0, 0, 7]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert mask.dtype == np.int32
