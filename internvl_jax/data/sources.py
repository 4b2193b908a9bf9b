"""Random-access sources of examples, each a sequence that Grain can read in any order.

A source has `len(source)`, `source[i]` and `source.identity`, a string that changes when its
content changes. An example is a dict, whose parts can also be read alone:

    source.image(i)      "image"      uint8 [H, W, 3]
    source.texts(i)      "image_id"   int; examples that share it match each other in retrieval
                         "captions"   {language: tuple of captions}, the canonical one first
                         "rounds"     tuple of (question, answer), a user's whole conversation
                         "color", "shape", "class_index"   where the example has them
    source.questions(i)  "qa"         tuple of (language, question, answer)
"""

import functools
import hashlib
import io
import json
import os
import pathlib
import zlib

import numpy as np

from internvl_jax.data import digits, image, questions, scenes, text

SCENE_COUNTS = {
    "train": 12000,
    "test": 1000,
    "test_single": 840,
    "unseen_pairs": 300,
    "relation_swap": 400,
}
_SCENES_VERSION = 1  # raise it when scenes or captions change, so that old runs do not resume


class EmbeddedScenes:
    """Rendered scenes of a split (`scenes.SPLITS`), kept in memory for the whole process."""

    def __init__(self, split: str = "train", size: int | None = None, image_size: int = 48):
        if split not in SCENE_COUNTS:
            raise ValueError(
                f"unknown scene split {split!r}; choose one of {', '.join(SCENE_COUNTS)}"
            )
        self.split, self.size = split, size or SCENE_COUNTS[split]
        self.image_size = image_size
        self.identity = f"scenes v{_SCENES_VERSION} {split} {self.size} at {image_size}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return _example(self, index)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def texts(self, index: int) -> dict:
        return _scene_texts(self.scenes[index].description)

    def questions(self, index: int) -> tuple:
        return _scene_questions(self.scenes[index].description)

    @property
    def scenes(self) -> tuple[scenes.Scene, ...]:
        """The descriptions of all records."""
        return _scenes(self.split, self.size)

    @property
    def images(self) -> np.ndarray:
        """All pictures: uint8 [N, H, W, 3], read-only."""
        return _pictures(self.split, self.size, self.image_size)


@functools.cache
def _scenes(split, size):
    return tuple(scenes.scene(split, i) for i in range(size))


@functools.cache
def _pictures(split, size, image_size):
    pictures = scenes.render(_scenes(split, size), image_size)
    pictures.flags.writeable = False
    return pictures


@functools.lru_cache(1 << 16)
def _scene_texts(description):
    color, shape, _ = description[0][0]
    return {
        "image_id": stable_number(repr(description)),
        "captions": {x: text.scene_captions(description, x) for x in text.LANGUAGES},
        "color": color,
        "shape": shape,
        "class_index": scenes.ALL_PAIRS.index((color, shape)),
    }


@functools.lru_cache(1 << 16)
def _scene_questions(description):
    return tuple(
        (language, *pair)
        for language in text.LANGUAGES
        for pair in questions.about_scene(description, language)
    )


class EmbeddedDigits:
    """The handwritten digits of scikit-learn; see `digits`."""

    def __init__(self, split: str = "train", image_size: int = 48):
        self.split, self.image_size = split, image_size
        self.images, self.labels = digits.load(split, image_size)
        self.identity = f"digits {split} {len(self.labels)} at {image_size}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return _example(self, index)

    def image(self, index: int) -> np.ndarray:
        return self.images[index]

    def texts(self, index: int) -> dict:
        return _digit_texts(int(self.labels[index]))

    def questions(self, index: int) -> tuple:
        digit = int(self.labels[index])
        return tuple(
            (language, *pair)
            for language in text.LANGUAGES
            for pair in questions.about_digit(digit, language)
        )


@functools.cache
def _digit_texts(digit):
    return {
        "image_id": stable_number(f"digit {digit}"),
        "captions": {x: text.digit_captions(digit, x) for x in text.LANGUAGES},
        "class_index": digit,
    }


class JsonlImages:
    """A user's images listed in a JSON Lines file, one object per line.

    Keys: "image", a path relative to `root` (the folder of the file by default); "caption", a
    text (in `language`) or {language: text or list of texts}; "conversations" in LLaVA form,
    a list of {"from": "human" | "gpt", "value": text}. At least one of the last two is needed.

    Lines are found by their byte offsets and parsed when read, so the file may be large. Errors
    are ValueErrors that begin with FILE:LINE.
    """

    def __init__(self, path: str | os.PathLike, root=None, language: str = "en"):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ValueError(f"no data file at {self.path}")
        self.root = pathlib.Path(root or self.path.parent).resolve()
        self.language = language

    def __len__(self) -> int:
        return len(self._lines[0])

    def __getitem__(self, index: int) -> dict:
        return _example(self, index)

    def image(self, index: int) -> np.ndarray:
        record, place = self._record(index)
        file = (self.root / record["image"]).resolve()
        if not file.is_relative_to(self.root):
            raise ValueError(f"{place}: image {record['image']!r} lies outside {self.root}")
        try:
            return np.asarray(image.read(file))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error

    def questions(self, index: int) -> tuple:
        return ()

    @property
    def identity(self) -> str:
        return f"jsonl {self.path.name} {len(self)} {self._lines[2]}"

    @functools.cached_property
    def _lines(self):
        """Byte offsets and line numbers of the non-blank lines, and a digest of the file."""
        offsets, numbers, digest = [], [], hashlib.sha256()
        with open(self.path, "rb") as file:
            position = 0
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    offsets.append(position)
                    numbers.append(number)
                position += len(line)
        return np.array(offsets, np.int64), np.array(numbers, np.int64), digest.hexdigest()

    def _record(self, index):
        offsets, numbers, _ = self._lines
        place = f"{self.path}:{numbers[index]}"
        with open(self.path, "rb") as file:
            file.seek(offsets[index])
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise ValueError(f'{place}: each line must be an object with an "image" path')
        if "caption" not in record and "conversations" not in record:
            raise ValueError(f'{place}: neither "caption" nor "conversations" is given')
        return record, place

    def texts(self, index: int) -> dict:
        record, place = self._record(index)
        captions = record.get("caption", {})
        if not isinstance(captions, dict):
            captions = {self.language: captions}
        captions = {
            key: tuple(value) if isinstance(value, list) else (value,)
            for key, value in captions.items()
        }
        if not all(isinstance(c, str) for values in captions.values() for c in values):
            raise ValueError(f'{place}: "caption" must be a text or {{language: text}}')
        return {
            "image_id": stable_number(record["image"]),
            "captions": captions,
            "rounds": _rounds(record.get("conversations", []), place),
        }


def _rounds(turns, place):
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    expected = ["human", "gpt"] * (len(turns) // 2)
    if speakers != expected or not all(isinstance(turn.get("value"), str) for turn in turns):
        raise ValueError(
            f'{place}: "conversations" must alternate {{"from": "human", "value": …}} and '
            '{"from": "gpt", "value": …}'
        )
    values = [turn["value"] for turn in turns]
    return tuple(zip(values[::2], values[1::2], strict=True))


class TfdsImages:
    """A data set prepared by tensorflow-datasets in the array_record format.

    captions: {language: name of a text feature}. The image feature is named "image".
    tensorflow-datasets is imported here, so that nothing else needs it; TensorFlow is not used.
    """

    def __init__(self, name: str, split: str, captions: dict[str, str], *, data_dir=None):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(
                "reading this source needs tensorflow-datasets: pip install 'internvl-jax[data]'"
            ) from error
        # Images stay encoded until they are asked for.
        self._data = tfds.data_source(
            name, split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()}
        )
        self._captions = captions
        self.identity = f"tfds {self._data.dataset_info.full_name} {split} {len(self._data)}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        return _example(self, index)

    def image(self, index: int) -> np.ndarray:
        return np.asarray(image.read(io.BytesIO(self._data[index]["image"])))

    def texts(self, index: int) -> dict:
        record = self._data[index]
        captions = {
            language: tuple(np.atleast_1d(np.asarray(record[key], object)))
            for language, key in self._captions.items()
        }
        captions = {key: tuple(c.decode() for c in values) for key, values in captions.items()}
        return {"image_id": int(record.get("image_id", index)), "captions": captions}

    def questions(self, index: int) -> tuple:
        return ()


def open_source(spec: str, image_size: int):
    """Opens a source by its name in a config.

    "scenes" and "digits" are the embedded sets, "scenes/test" another split of one;
    "jsonl:PATH" is a user's file.
    """
    kind, _, path = spec.partition(":")
    if kind == "jsonl" and path:
        return JsonlImages(path)
    name, _, split = spec.partition("/")
    if name == "scenes":
        return EmbeddedScenes(split or "train", image_size=image_size)
    if name == "digits":
        return EmbeddedDigits(split or "train", image_size)
    raise ValueError(f"unknown data source {spec!r}; use scenes, digits or jsonl:PATH")


def _example(source, index):
    image = source.image(index)
    return {"image": image, **source.texts(index), "qa": source.questions(index)}


def stable_number(name: str) -> int:
    """A stable positive 31-bit number for a name."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
