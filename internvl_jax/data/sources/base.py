"""What every source of examples is, and what the records of users' files share."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from internvl_jax.data import image
from internvl_jax.data.errors import RecordError

CONVERSATION_KEYS = ("conversations", "conversation")
CAPTION_KEYS = ("caption", "captions", "txt", "text", "TEXT", "title")
MAX_CHARACTERS = 1 << 16  # of a text; what follows lies far beyond any context
IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp", "img", "image/encoded", "image_bytes")


class Source:
    """Random access to examples; see the package for what the parts hold.

    A format defines `identity`, `__len__`, `image_in` and `texts_in`. The last two take a handle
    as `fetch` gives it, so that a record which is one blob is read once for both, and a batch of
    records together. A record that cannot be used raises RecordError.
    """

    identity: str

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, indices: Sequence[int]) -> list[Any]:
        """A handle for each record; by default its number, and the parts are read when needed.

        In place of a handle there may be a RecordError.
        """
        return list(indices)

    def image_in(self, handle: Any) -> np.ndarray | bytes | tuple[bytes, ...] | None:
        """Pixels, or an encoded image, or several of them, or None for text alone."""
        raise NotImplementedError

    def texts_in(self, handle: Any) -> dict:
        raise NotImplementedError

    def questions_in(self, handle: Any) -> tuple:
        return ()

    def metadata_in(self, handle: Any) -> Mapping[str, Any]:
        """What the record holds beside image and text, as scores: values by name."""
        return {}

    def place(self, index: int) -> str:
        """Where a record lies, for messages."""
        return f"{self.identity}, record {index}"

    def handle(self, index: int) -> Any:
        (handle,) = self.fetch([index])
        if isinstance(handle, RecordError):
            raise handle
        return handle

    def image(self, index: int) -> np.ndarray:
        """Pixels of a record's (first) image, uint8 [H, W, 3]."""
        try:
            encoded = self.image_in(self.handle(index))
            if isinstance(encoded, np.ndarray):
                return encoded
            if isinstance(encoded, tuple):
                encoded = encoded[0]
            if encoded is None:
                raise RecordError("missing_image", "the record has no image")
            return np.asarray(image.decode(encoded))
        except RecordError as error:
            raise error.at(self.place(index)) from error

    def texts(self, index: int) -> dict:
        try:
            return self.texts_in(self.handle(index))
        except RecordError as error:
            raise error.at(self.place(index)) from error

    def questions(self, index: int) -> tuple:
        return self.questions_in(self.handle(index))

    def __getitem__(self, index: int) -> dict:
        return {
            "image": self.image(index), **self.texts(index), "qa": self.questions(index)
        }


def stable_number(name: str) -> int:
    """A stable positive 31-bit number for a name."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def first(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first key that the record has and that is not None."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def texts_of(record: Mapping[str, Any], name: str, language: str, caption: str = "") -> dict:
    """The text parts of a record of any format.

    record: values by name, texts as str or UTF-8 bytes; a value "json" may hold more of them.
    name: of the image, which makes the image_id unless the record has one. caption: the key that
    holds the captions; by default the first of CAPTION_KEYS.
    """
    if "json" in record:
        inner = parsed_json(record["json"])
        record = {**inner, **{k: v for k, v in record.items() if k != "json"}}
    captions = first(record, (caption,) if caption else CAPTION_KEYS)
    turns = first(record, CONVERSATION_KEYS)
    if captions is None and turns is None:
        raise RecordError("missing_text", 'neither "caption" nor "conversations" is given')
    if isinstance(turns, str | bytes):
        turns = parsed_json(turns, of=list)
    number = record.get("image_id")
    return {
        "image_id": stable_number(name if number is None else f"{_plain(number)}"),
        "captions": _captions({} if captions is None else captions, language),
        "rounds": _rounds(turns or []),
    }


def parsed_json(text: str | bytes, of: type = dict) -> Any:
    """The JSON object (or list) in a text, or RecordError."""
    try:
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise RecordError("invalid_text", f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RecordError("invalid_json", f"not valid JSON: {error}") from error
    if not isinstance(value, of):
        kind = "an object" if of is dict else "a list"
        raise RecordError("invalid_json", f"the JSON must be {kind}")
    return value


def _plain(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _captions(captions, language):
    if not isinstance(captions, Mapping):
        captions = {language: captions}
    result = {}
    for key, value in captions.items():
        values = value if isinstance(value, list | tuple) else (value,)
        result[str(key)] = tuple(_text(value) for value in values)
    return result


def _text(value):
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", f"the caption is not UTF-8: {error}") from error
    if not isinstance(value, str):
        raise RecordError("invalid_text", '"caption" must be a text or {language: text}')
    # Half of a surrogate pair, as broken JSON escapes give, has no UTF-8 form.
    return value[:MAX_CHARACTERS].encode("utf-8", "replace").decode()


def _rounds(turns):
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if speakers[:1] == ["system"]:
        turns, speakers = turns[1:], speakers[1:]
    expected = ["human", "gpt"] * (len(turns) // 2)
    if speakers != expected or not all(isinstance(turn.get("value"), str) for turn in turns):
        raise RecordError(
            "invalid_conversation",
            '"conversations" must alternate {"from": "human", "value": …} and '
            '{"from": "gpt", "value": …}',
        )
    values = [_text(turn["value"]) for turn in turns]
    return tuple(zip(values[::2], values[1::2], strict=True))
