"""SentencePiece tokenizer with the conventions of the LLaMA family.

Texts become [BOS] pieces [EOS], right-padded with 0. Special ids come from the caller alone:
a text that spells "</s>" is tokenised letter by letter unless `parse_special` is given.
"""

import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

PAD_ID = 0
DEFAULT_MODEL = pathlib.Path(__file__).parent.parent / "assets" / "tokenizer.model"
_CACHE_SIZE = 1 << 16
_CACHED_TEXT = 1000  # characters; longer texts hardly come twice, and would fill the memory


class Tokenizer:
    """Encodes and decodes text with a SentencePiece model file.

    path: the model file; without it the one shipped with the package.
    Raises ValueError when the file is missing or is not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = pathlib.Path(path or DEFAULT_MODEL)
        if not self.path.is_file():
            raise ValueError(f"no tokenizer model at {self.path}; give a SentencePiece .model file")
        model = self.path.read_bytes()
        self.digest = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            # For text that continues another: without the leading space the model adds. Of two
            # concatenated protocol buffers the later fields win; this one says
            # normalizer_spec.add_dummy_prefix = false.
            self._inner = sentencepiece.SentencePieceProcessor(
                model_proto=model + b"\x1a\x02\x18\x00"
            )
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self._model.vocab_size()
        self.unk_id, self.bos_id, self.eos_id = (
            self._model.unk_id(),
            self._model.bos_id(),
            self._model.eos_id(),
        )
        pieces = range(self.vocab_size)
        self._special = {self.unk_id, *(i for i in pieces if self._model.is_control(i))}
        self._control = self._pattern(i for i in self._special)
        symbols = _user_defined(model)
        self._symbols = self._pattern(symbols) if symbols else None
        # Training draws the same texts over and over.
        self._cached = functools.lru_cache(_CACHE_SIZE)(self._pieces)
        self._row = functools.lru_cache(_CACHE_SIZE)(self._padded)

    def __reduce__(self):
        return Tokenizer, (self.path,)  # for worker processes; the caches stay here

    def encode(
        self,
        text: str,
        *,
        bos: bool = True,
        eos: bool = False,
        length: int | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Ids of a text, cut to `length`. A cut text keeps its end-of-text id if `eos` is set.

        parse_special: take the model's control symbols and "<unk>" in the text for special ids,
        each piece between them starting afresh, as the slow HF LlamaTokenizer does. Only for
        text from a trusted source.
        """
        ids = [self.bos_id] if bos else []
        pieces = self._cached if len(text) <= _CACHED_TEXT else self._pieces
        ids += pieces(text, parse_special)
        room = None if length is None else max(0, length - eos)
        return ids[:room] + ([self.eos_id] if eos and length != 0 else [])

    def encode_batch(
        self, texts: Sequence[str], length: int, *, bos: bool = True, eos: bool = True
    ) -> np.ndarray:
        """Right-padded ids of many texts: int32 [N, length], 0 after the end."""
        if not texts:
            return np.zeros((0, length), np.int32)
        rows = [self._row if len(text) <= _CACHED_TEXT else self._padded for text in texts]
        return np.stack([row(x, length, bos, eos) for row, x in zip(rows, texts, strict=True)])

    def tokenize(self, text: str, *, parse_special: bool = False) -> list[str]:
        """The pieces of a text as written in it: an unknown piece is its own letters."""
        return [piece for _, piece in self._parts(text, parse_special)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids. Special, padding and placeholder ids (negative) are left out.

        One leading space is dropped, as by the slow HF LlamaTokenizer.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and int(i) not in self._special]
        return self._model.decode(kept).removeprefix(" ")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entries behind ids."""
        return [self._model.id_to_piece(int(i)) for i in ids]

    def _padded(self, text, length, bos, eos):
        row = np.full(length, PAD_ID, np.int32)
        ids = self.encode(text, bos=bos, eos=eos, length=length)
        row[: len(ids)] = ids
        return row

    def _pieces(self, text, parse_special):
        return tuple(i for i, _ in self._parts(text, parse_special))

    def _parts(self, text, parse_special):
        """(id, piece) of each part of a text."""
        if not parse_special:
            return self._plain(text)
        parts = []
        position = 0
        for match in self._control.finditer(text):
            parts += self._plain(text[position : match.start()])
            parts.append((self._model.piece_to_id(match.group()), match.group()))
            position = match.end()
        return parts + self._plain(text[position:])

    def _plain(self, text):
        """(id, piece) of text in which nothing is special, not even a user-defined symbol."""
        if not text:
            return []
        if self._symbols is None or not self._symbols.search(text):
            return _encoded(self._model, text)
        # The model finds user-defined symbols by itself. Cut inside each, it cannot see them.
        cuts = [match.start() + 1 for match in self._symbols.finditer(text)]
        first, *rest = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        parts = _encoded(self._model, first)
        for part in rest:
            parts += _encoded(self._inner, part)
        return parts

    def _pattern(self, ids):
        pieces = sorted((self._model.id_to_piece(i) for i in ids), key=len, reverse=True)
        return re.compile("|".join(re.escape(piece) for piece in pieces))


class Detokenizer:
    """The text of ids that come one by one; spaces at its start are left out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """What one more id adds, which is "" while a letter of several bytes is incomplete."""
        self._ids.append(int(token))
        text = self._text()
        return "" if text.endswith("\ufffd") else self._rest(text)

    def end(self) -> str:
        """What was held back."""
        return self._rest(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids).lstrip()

    def _rest(self, text: str) -> str:
        rest, self._shown = text[self._shown :], len(text)
        return rest


def padded(
    rows: Sequence[Sequence[int]], length: int | None = None, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array with 0 on the given side, and its mask: two int32 [N, length].

    length: None takes the longest row's. The mask is 1 on ids of the rows, 0 on the padding.
    """
    length = max(map(len, rows), default=0) if length is None else length
    ids = np.full((len(rows), length), PAD_ID, np.int32)
    mask = np.zeros_like(ids)
    for n, row in enumerate(rows):
        here = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[n, here], mask[n, here] = row, 1
    return ids, mask


def _encoded(model, text):
    return list(zip(model.encode(text), model.encode(text, out_type=str), strict=True))


def _user_defined(model: bytes) -> list[int]:
    """Ids of the pieces of type USER_DEFINED (4), which the library has no accessor for.

    Field 1 of a model file is the list of pieces, field 3 of a piece its type.
    """
    pieces = [value for number, value in _fields(model) if number == 1]
    return [i for i, piece in enumerate(pieces) if (3, 4) in _fields(piece)]


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """Top-level (field number, value) pairs of a serialised protocol buffer."""
    fields, position = [], 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = message[position : position + size]
            position += size
        fields.append((number, value))
    return fields
