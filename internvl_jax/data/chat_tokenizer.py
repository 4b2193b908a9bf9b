"""Tokenizers of the newer families: special tokens around turns and images.

InternVL 2 to 3.5 write a conversation with the special tokens of Qwen2, Qwen3, InternLM2 or Phi3.
Their folders hold a tokenizer.json, or vocab.json and merges.txt (byte-level BPE), or a
SentencePiece tokenizer.model; and name special tokens in added_tokens.json or
tokenizer_config.json. Between special tokens a text is tokenised as a whole, as the released
program does; what a user wrote never becomes a special token.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from internvl_jax.data.templates import Template
from internvl_jax.data.tokenizer import Tokenizer

IMAGE_MARK, IMAGE_TOKEN = "<image>", -200
FILES = ("tokenizer.model", "tokenizer.json", "merges.txt")
# How Qwen2 and Qwen3 cut a text before byte-level BPE.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class BytePairs:
    """Byte-level BPE through the `tokenizers` package; special tokens in a text are plain text."""

    def __init__(self, folder: Path):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{folder} has a byte-level tokenizer; reading it needs: pip install tokenizers"
            ) from None
        if (folder / "tokenizer.json").is_file():
            self._model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
            self._model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
            self._model.normalizer = tokenizers.normalizers.NFC()
            words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), "isolated")
            letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            self._model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, letters])
            self._model.decoder = tokenizers.decoders.ByteLevel()
        self.first = self._model.encode("").ids  # what stands before every text
        self.special = {t.content: i for i, t in self._model.get_added_tokens_decoder().items()}
        self._model.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


class SentencePieces:
    """The SentencePiece tokenizer of a folder, in the same form."""

    def __init__(self, folder: Path):
        self._model = Tokenizer(folder / "tokenizer.model")
        self.first = [self._model.bos_id]
        self.special: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, bos=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(ids)


class ChatTokenizer:
    """Conversations of one template as ids, and ids as text.

    folder: with the files of a released model. layout: its template.
    Raises ValueError where the files are not there, or lack a special token of the template.
    """

    def __init__(self, folder: Path, layout: Template):
        self.path, self._layout = folder, layout
        if not holds_tokenizer(folder):
            raise ValueError(f"{folder} has none of {', '.join(FILES)}")
        sentences = (folder / "tokenizer.model").is_file()
        self._text = SentencePieces(folder) if sentences else BytePairs(folder)
        config = _read(folder / "tokenizer_config.json")
        decoder = config.get("added_tokens_decoder", {})
        self._special = {
            **self._text.special,
            **_read(folder / "added_tokens.json"),
            **{entry["content"]: int(number) for number, entry in decoder.items()},
        }
        self._strips = {entry["content"] for entry in decoder.values() if entry.get("rstrip")}
        self._first = self._text.first if config.get("add_bos_token", True) else []
        needed = [*re.findall(r"<\|.*?\|>", layout.prompt([("", "")])), "<img>", "</img>"]
        missing = [piece for piece in dict.fromkeys(needed) if piece not in self._special]
        if missing:
            raise ValueError(f"the tokenizer in {folder} lacks {', '.join(missing)}")
        pieces = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, pieces)))
        self._hidden = set(self._special.values())
        self.eos_id = self._special[layout.end.strip()]

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of a text in which nothing is special."""
        return (list(self._first) if bos else []) + self._text.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special ones and image positions left out."""
        return self._text.decode([int(i) for i in ids if i >= 0 and int(i) not in self._hidden])

    def encode_chat(
        self, rounds: Sequence[tuple[str, str | None]], image_tokens: int | Sequence[int]
    ) -> list[int]:
        """Ids of rounds of (question, answer) with `<image>` marks; the last answer may be None.

        image_tokens: positions of every image, or of each in turn.
        """
        if isinstance(image_tokens, int):
            counts = itertools.repeat(image_tokens)
        else:
            counts = itertools.chain(image_tokens, itertools.repeat(0))
        ids, run = list(self._first), ""
        for part in self._parts(rounds):
            if isinstance(part, str) and part != IMAGE_MARK:
                run += part
                continue
            ids += self._text.encode(run) if run else []
            run = ""
            if part == IMAGE_MARK:
                picture = [IMAGE_TOKEN] * next(counts)
                ids += [self._special["<img>"], *picture, self._special["</img>"]]
            else:
                ids.append(part)
        return ids + (self._text.encode(run) if run else [])

    def _parts(self, rounds: Sequence[tuple[str, str | None]]) -> Iterator[str | int]:
        """Ids of special tokens, image marks, and the text between them."""
        yield from self._trusted(self._layout.start())
        for question, answer in rounds:
            yield from self._trusted(self._layout.user)
            for n, text in enumerate(question.split(IMAGE_MARK)):
                if n:
                    yield IMAGE_MARK
                yield text
            yield from self._trusted(self._layout.between + self._layout.assistant)
            if answer is not None:
                yield self._layout.space + answer.replace(IMAGE_MARK, "")
                yield from self._trusted(self._layout.end)

    def _trusted(self, text: str) -> Iterator[str | int]:
        position = 0
        for match in self._pattern.finditer(text):
            yield text[position : match.start()]
            yield self._special[match.group()]
            position = match.end()
            if match.group() in self._strips:  # such tokens swallow the space after them
                position += len(text[position:]) - len(text[position:].lstrip())
        yield text[position:]


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
