"""Published data sets as they lie on a user's disk: pictures decoded on demand, labels, captions.

Folders of classes, and the tar files that CLIP_benchmark publishes (`<name>/test/0.tar`,
`classnames.txt`). `caption_files` reads captions, `question_files` questions.
"""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from internvl_jax.data import image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".jpe"})
_DECODERS = 8  # threads: Pillow releases the interpreter while it decodes


class DatasetError(ValueError):
    """A data set is missing, or is not the one that a protocol asks for."""


@dataclass(frozen=True)
class Place:
    """Where an encoded picture lies: a file, or `size` bytes of one from `offset` on.

    name: what its data set calls it where that is not the file's name.
    """

    path: Path
    offset: int = 0
    size: int | None = None
    name: str = ""

    def open(self) -> Image.Image:
        if self.size is None:
            return image.read(self.path)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        try:
            return image.read(io.BytesIO(data))
        except ValueError as error:
            raise ValueError(f"{self.path} at byte {self.offset}: {error}") from error


@dataclass(frozen=True)
class Encoded:
    """An encoded picture that came within a table: `where` says which row of the file `path`."""

    path: Path
    where: str
    data: bytes = field(repr=False)

    def open(self) -> Image.Image:
        try:
            return image.read(io.BytesIO(self.data))
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error


class Pictures:
    """Pictures that are decoded when a slice of them is asked for: uint8 [n, size, size, 3].

    Batches of it go through `features.in_batches` like those of an array: while the device works
    on one, the next is decoded.
    """

    def __init__(
        self,
        places: Sequence[Place | Encoded],
        size: int,
        transform: Callable[[Image.Image, int], np.ndarray] = image.square,
    ):
        self.places, self.size, self.transform = list(places), size, transform

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._decoded(self.places[index])

    def take(self, numbers: Sequence[int]) -> np.ndarray:
        """Pictures by their numbers, in that order."""
        return self._decoded([self.places[number] for number in numbers])

    def _decoded(self, places: Sequence[Place | Encoded]) -> np.ndarray:
        with ThreadPoolExecutor(_DECODERS) as pool:
            rows = list(pool.map(self._read, places))
        return np.stack(rows) if rows else np.zeros((0, self.size, self.size, 3), np.uint8)

    def _read(self, place: Place | Encoded) -> np.ndarray:
        return self.transform(place.open(), self.size)


def need(path: Path, what: str) -> Path:
    """The path, if it is there. Raises DatasetError that says what was looked for."""
    if not path.exists():
        raise DatasetError(f"{what} is missing: expected at {path}")
    return path


def first(paths: Sequence[Path]) -> Path:
    """The first of the paths that is there, else the first."""
    return next((path for path in paths if path.exists()), paths[0])


def pictures_in(folder: Path) -> list[Path]:
    """The picture files directly in a folder, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def class_folders(folder: Path) -> tuple[list[Place], np.ndarray, list[str]]:
    """`folder/<class>/<picture>`: places, labels [N] and the sorted names of the folders.

    Folders whose names are all numbers (ImageNet-V2) are in numerical order.
    """
    names = [p.name for p in need(folder, "a folder per class").iterdir() if p.is_dir()]
    numeric = all(name.isdecimal() for name in names)
    names.sort(key=int if numeric else None)
    groups = [pictures_in(folder / name) for name in names]
    labels = np.repeat(np.arange(len(names)), [len(group) for group in groups])
    return [Place(path) for group in groups for path in group], labels, names


def tar_samples(folder: Path) -> Iterator[dict[str, Place | bytes]]:
    """Samples of the tar files of a folder in order: {"image": Place, "cls" or "txt": bytes}."""
    shards = sorted(need(folder, "a folder of tar files").glob("*.tar"), key=_shard_number)
    if not shards:
        raise DatasetError(f"no tar files in {folder}: expected 0.tar, 1.tar, …")
    for shard in shards:
        key, sample = None, {}
        with tarfile.open(shard) as archive:
            for member in archive:
                stem, _, suffix = member.name.partition(".")
                if key is not None and stem != key:
                    yield sample
                    sample = {}
                key = stem
                if f".{suffix.lower()}" in SUFFIXES:
                    sample["image"] = Place(shard, member.offset_data, member.size, Path(stem).name)
                elif suffix in ("cls", "txt"):
                    sample[suffix] = archive.extractfile(member).read()
        if sample:
            yield sample


def _shard_number(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() else -1, path.stem)


def tar_classes(folder: Path) -> tuple[list[Place], np.ndarray, list[str]]:
    """A classification set of CLIP_benchmark's tar files: places, labels, class names."""
    samples = list(tar_samples(folder / "test"))
    names = need(folder / "classnames.txt", "the list of class names").read_text("utf-8")
    labels = np.array([int(sample["cls"]) for sample in samples])
    return [sample["image"] for sample in samples], labels, names.strip("\n").split("\n")


def present(places: Sequence[Place | Encoded]) -> None:
    """Check that every picture file is there. Raises DatasetError with the first that is not."""
    paths = dict.fromkeys(place.path for place in places)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(paths)} picture files are missing, the first at {missing[0]}"
        )
