"""Which records are near-duplicates of earlier ones: a shard, and a part of the keys, at a time.

A shard's keys are written in parts by their value, so that equal keys of all shards meet in one
part; a part is then worked through alone. Hashes of images stand beside their keys; signatures of
captions lie in one array per shard, which is mapped into memory. A record goes if it is near an
earlier one, or one of those to exclude, whatever becomes of that one; so the result does not depend
on any order of the work.
"""

import bisect
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from pyarrow import parquet

from internvl_jax.data.curate import hashing

KEY = np.dtype([("key", "<u8"), ("record", "<u8"), ("hash", "<u8"), ("whole", "?")])
KINDS = ("images", "captions")
_MOST = 20_000  # entries of one key that are compared with one another
_BLOCK = 256  # of them at a time


@dataclasses.dataclass(frozen=True)
class Work:
    """Where the intermediate files of one kind lie, and how many records each shard has.

    starts: number of the first record of each shard, and of all. excluded: records before this
    number are those to exclude, and never go themselves.
    """

    folder: str
    kind: str
    parts: int
    starts: tuple[int, ...]
    excluded: int = 0

    def hashes(self, shard: int) -> pathlib.Path:
        return pathlib.Path(self.folder, f"{self.kind}-{shard:06d}.npy")

    def keys(self, shard: int, part: int) -> pathlib.Path:
        return pathlib.Path(self.folder, f"{self.kind}-{shard:06d}-{part:04d}.keys.npy")

    def removed(self, part: int) -> pathlib.Path:
        return pathlib.Path(self.folder, f"{self.kind}-{part:04d}.removed.npy")


def write_keys(work: Work, shard: int, hashes: np.ndarray) -> None:
    """The hashes of a shard's records, and their keys in parts."""
    records = np.arange(len(hashes), dtype=np.uint64) + np.uint64(work.starts[shard])
    if work.kind == "images":
        keys = hashing.image_keys(hashes)  # [N, parts of the image, bands]
        kept, values = hashes != 0, hashes[..., None]
    else:
        save(work.hashes(shard), hashes)
        keys = hashing.caption_keys(hashes)[:, None]
        kept, values = hashes.any(axis=1, keepdims=True), 0
    entries = np.empty(keys.shape, KEY)
    entries["key"] = keys
    entries["record"] = records[:, None, None]
    entries["hash"] = values
    entries["whole"] = (np.arange(keys.shape[1]) == 0)[:, None]
    entries = entries[np.broadcast_to(kept[..., None], keys.shape)]
    part = entries["key"] % np.uint64(work.parts)
    order = np.argsort(part, kind="stable")
    entries, ends = entries[order], np.cumsum(np.bincount(part.astype(int), minlength=work.parts))
    for number in range(work.parts):
        save(work.keys(shard, number), entries[ends[number - 1] if number else 0 : ends[number]])


def match(work: Work, part: int) -> None:
    """Finds the records that go by the keys of one part, and writes their numbers."""
    shards = range(len(work.starts) - 1)
    entries = np.concatenate([np.load(work.keys(shard, part)) for shard in shards])
    entries = entries[np.lexsort((entries["record"], entries["key"]))]
    removed: set[int] = set()
    if work.kind == "images":
        for group in _groups(entries):
            removed.update(_near_images(group))
    else:
        stored = [np.load(work.hashes(shard), mmap_mode="r") for shard in shards]
        for group in _groups(entries):
            removed.update(_near_captions(group, work.starts, stored))
    found = np.array(sorted(removed), np.uint64)
    save(work.removed(part), found[found >= work.excluded])


def _groups(entries: np.ndarray) -> Iterator[np.ndarray]:
    """The entries of each key that more than one record has, in the order of the records."""
    bounds = [0, *(np.flatnonzero(np.diff(entries["key"])) + 1).tolist(), len(entries)]
    for first, end in itertools.pairwise(bounds):
        for start in range(first, end, _MOST):
            piece = entries[start : min(start + _MOST, end)]
            if len(piece) > 1 and piece["record"][0] != piece["record"][-1]:
                yield piece


def _near_images(group: np.ndarray) -> Iterator[int]:
    """Records of a group that are near an earlier one of it."""
    hashes, records, whole = group["hash"], group["record"], group["whole"]
    for start in range(0, len(group), _BLOCK):
        rows = slice(start, start + _BLOCK)
        near = hashing.distance(hashes[rows, None], hashes) <= hashing.IMAGE_BITS
        # Of two parts of images one is a whole: parts of two images prove nothing.
        near &= whole[rows, None] | whole
        near &= records < records[rows, None]
        yield from records[rows][near.any(axis=1)].tolist()


def _near_captions(group: np.ndarray, starts: Sequence[int], stored: Sequence) -> Iterator[int]:
    records = group["record"].tolist()
    signatures = []
    for record in records:
        shard = bisect.bisect_right(starts, record) - 1
        signatures.append(stored[shard][record - starts[shard]])
    signatures = np.stack(signatures)
    for row in range(1, len(group)):
        share = (signatures[:row] == signatures[row]).mean(axis=1)
        if (share >= hashing.CAPTION_SHARE).any():
            yield records[row]


def hashes_of(path: str, kind: str) -> np.ndarray:
    """What is compared of each record of a score file; zeros where there is nothing."""
    width = len(hashing.PARTS) if kind == "images" else hashing.WORD_HASHES
    column = "image_hashes" if kind == "images" else "caption"
    found = []
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                if kind == "captions":
                    found.append(hashing.caption_signature(value or ""))
                else:
                    found.append(np.array(value or [0] * width, np.uint64))
    dtype = np.uint64 if kind == "images" else np.uint32
    return np.stack(found) if found else np.zeros((0, width), dtype)


def save(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an array so that it appears as a whole: a worker may be run twice."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
