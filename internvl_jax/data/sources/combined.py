"""Sources made of other sources: parts of one, and several after one another."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.sources.base import Source
from internvl_jax.data.sources.tables import JsonlImages


class Selected(Source):
    """The records of a source whose numbers a list holds, as `data filter` and `dedup` write it.

    path: a .npy file of integers, which is mapped into memory.
    """

    def __init__(self, source: Source, path: str):
        self.source, self.path = source, path
        try:
            self._numbers = np.load(path, mmap_mode="r")
        except FileNotFoundError:
            raise ValueError(f"no index list at {path}") from None
        except ValueError as error:
            raise ValueError(f"{path} is no index list: {error}") from error
        numbers = self._numbers
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold a list of integers")
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(source)):
            raise ValueError(
                f"{path} names record {numbers.max()}, but {source.identity} has {len(source)}"
            )

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self._numbers)).hexdigest()
        return f"{self.source.identity} selected {len(self)} {digest}"

    def __getstate__(self):
        return {"source": self.source, "path": self.path}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._numbers = np.load(self.path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, index: int) -> str:
        return self.source.place(int(self._numbers[index]))

    def fetch(self, indices: Sequence[int]) -> list:
        return self.source.fetch([int(self._numbers[i]) for i in indices])

    def image_in(self, handle: Any):
        return self.source.image_in(handle)

    def texts_in(self, handle: Any) -> dict:
        return self.source.texts_in(handle)

    def questions_in(self, handle: Any) -> tuple:
        return self.source.questions_in(handle)

    def metadata_in(self, handle: Any):
        return self.source.metadata_in(handle)


class Concatenated(Source):
    """Sources after one another, each `times` over.

    parts: (name, source, times); of a fraction of a time the first records are taken.
    """

    def __init__(self, parts: Sequence[tuple[str, Source, float]]):
        self.parts = tuple(parts)
        counts = [int(len(source) * times) for _, source, times in parts]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @functools.cached_property
    def identity(self) -> str:
        content = json.dumps([(name, s.identity, times) for name, s, times in self.parts])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return f"{len(self.parts)} data sets {len(self)} {digest}"

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index):
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        source = self.parts[part][1]
        return source, (index - int(self._starts[part])) % len(source)

    def place(self, index: int) -> str:
        source, number = self._find(index)
        return source.place(number)

    def fetch(self, indices: Sequence[int]) -> list:
        handles = []
        for source, number in map(self._find, indices):
            (handle,) = source.fetch([number])
            handles.append(handle if isinstance(handle, Exception) else (source, handle))
        return handles

    def image_in(self, handle: tuple):
        return handle[0].image_in(handle[1])

    def texts_in(self, handle: tuple) -> dict:
        return handle[0].texts_in(handle[1])

    def questions_in(self, handle: tuple) -> tuple:
        return handle[0].questions_in(handle[1])


def chat_mixture(path: str, language: str = "en") -> Concatenated:
    """The official meta file of InternVL-Chat: {name: {"root", "annotation", "repeat_time", …}}.

    Paths that are not absolute are relative to the meta file. "repeat_time" may be a fraction. A
    "length" that the annotation does not have is a ValueError.
    """
    if not files.exists(path):
        raise ValueError(f"no data file at {path}")
    folder = files.folder_of(path)
    try:
        meta = json.loads(files.read(path))
        entries = [(name, dict(entry)) for name, entry in meta.items()]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f'{path}: must be {{name: {{"root": …, "annotation": …}}}}: {error}'
        ) from error

    def absolute(name):
        return name if name.startswith("/") or files.is_remote(name) else f"{folder}/{name}"

    parts = []
    for name, entry in entries:
        if not isinstance(entry.get("annotation"), str):
            raise ValueError(f'{path}: data set {name!r} has no "annotation"')
        source = JsonlImages(
            absolute(entry["annotation"]), absolute(entry.get("root") or "."), language
        )
        length = entry.get("length", len(source))
        if length != len(source):
            raise ValueError(
                f'{path}: data set {name!r} has "length" {length}, but its annotation has '
                f"{len(source)} records"
            )
        times = entry.get("repeat_time", 1)
        if not isinstance(times, int | float) or times <= 0:
            raise ValueError(f'{path}: data set {name!r} has "repeat_time" {times!r}, not positive')
        parts.append((name, source, times))
    if not parts:
        raise ValueError(f"{path}: names no data set")
    return Concatenated(parts)
