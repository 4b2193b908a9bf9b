"""Which records are near-duplicates of earlier ones: a shard, and a part of the keys, at a time.

A shard's keys are written in parts by their value, so that equal keys of all shards meet in one
part; a part is then worked through alone, some thousands of entries at a time. Thumbnails of images
and signatures of captions lie in one array per shard, which is mapped into memory; what rules most
pairs of images out stands beside their keys. A record goes if it is near an earlier one, or one of
those to exclude, whatever becomes of that one; so the result does not depend on any order of the
work.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from pyarrow import parquet

from internvl_jax.data.curate import hashing

KEY = np.dtype([("key", "<u8"), ("record", "<u8")])
IMAGE_KEY = np.dtype([*KEY.descr, ("part", "u1"), ("spread", "u1"), ("head", "i1", hashing.HEAD)])
KINDS = ("images", "captions")
_MOST = 20_000  # entries of one key that are compared with one another; and read at a time
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
    """What is compared of a shard's records, and their keys in parts."""
    save(work.hashes(shard), hashes)
    records = np.arange(len(hashes), dtype=np.uint64) + np.uint64(work.starts[shard])
    if work.kind == "images":
        entries = _image_entries(records, hashes)
    else:
        keys = hashing.caption_keys(hashes)
        entries = np.empty(keys.shape, KEY)
        entries["key"], entries["record"] = keys, records[:, None]
        entries = entries[hashes.any(axis=1)].ravel()
    part = entries["key"] % np.uint64(work.parts)
    order = np.argsort(part, kind="stable")
    entries, ends = entries[order], np.cumsum(np.bincount(part.astype(int), minlength=work.parts))
    for number in range(work.parts):
        save(work.keys(shard, number), entries[ends[number - 1] if number else 0 : ends[number]])


def _image_entries(records: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    keys, part, head, spread = hashing.image_keys(thumbnails)
    entries = np.empty(keys.shape, IMAGE_KEY)
    entries["key"], entries["record"], entries["part"] = keys, records[:, None], part
    entries["head"], entries["spread"] = head, spread
    return entries[spread[:, 0] > 0].ravel()


def match(work: Work, part: int) -> None:
    """Finds the records that go by the keys of one part, and writes their numbers."""
    shards = range(len(work.starts) - 1)
    entries = np.concatenate([np.load(work.keys(shard, part)) for shard in shards])
    entries = entries[np.lexsort((entries["record"], entries["key"]))]
    removed: set[int] = set()
    stored = _Stored(
        np.array(work.starts), [np.load(work.hashes(shard), mmap_mode="r") for shard in shards]
    )
    images = work.kind == "images"
    near = _near_images if images else _near_captions
    for groups in _batches(_groups(entries)):
        first, end = groups[0].start, groups[-1].stop
        compared = stored[entries["record"][first:end]]
        if images:
            compared = hashing.views(compared, entries["part"][first:end])
        for group in groups:
            own = compared[group.start - first : group.stop - first]
            removed.update(near(entries[group], own))
    found = np.array(sorted(removed), np.uint64)
    save(work.removed(part), found[found >= work.excluded])


def _groups(entries: np.ndarray) -> Iterator[slice]:
    """The entries of each key that more than one record has, in the order of the records."""
    bounds = [0, *(np.flatnonzero(np.diff(entries["key"])) + 1).tolist(), len(entries)]
    records = entries["record"]
    for first, end in itertools.pairwise(bounds):
        for start in range(first, end, _MOST):
            last = min(start + _MOST, end) - 1
            if records[start] != records[last]:
                yield slice(start, last + 1)


def _batches(groups: Iterable[slice]) -> Iterator[list[slice]]:
    """Groups that follow one another, so many that their records are worth reading together."""
    batch: list[slice] = []
    for group in groups:
        batch.append(group)
        if group.stop - batch[0].start >= _MOST:
            yield batch
            batch = []
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Arrays of all shards, mapped into memory."""

    starts: np.ndarray
    arrays: list[np.ndarray]

    def __getitem__(self, records: np.ndarray) -> np.ndarray:
        records = records.astype(np.int64)
        shards = np.searchsorted(self.starts, records, side="right") - 1
        found = np.empty((len(records), self.arrays[0].shape[1]), self.arrays[0].dtype)
        for shard in np.unique(shards):
            chosen = shards == shard
            found[chosen] = self.arrays[shard][records[chosen] - self.starts[shard]]
        return found


def _near_images(group: np.ndarray, views: np.ndarray) -> Iterator[int]:
    """Records of a group that are copies of an earlier one of it, by the views that meet."""
    for start in range(0, len(group), _BLOCK):
        rows = slice(start, start + _BLOCK)
        possible = _possible(group[rows], group)
        left, right = (np.flatnonzero(possible.any(axis=axis)) for axis in (1, 0))
        if len(left):
            same = hashing.copies(views[rows][left], views[right])
            same &= possible[np.ix_(left, right)]
            yield from group[rows]["record"][left[same.any(axis=1)]].tolist()


def _possible(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Pairs bool [rows, group] whose lowest frequencies do not rule out that they are copies.

    The difference of all frequencies is at least that of these, each of which is rounded.
    """
    one, two = (entries["head"].astype(np.float32) for entries in (rows, group))
    square = (one**2).sum(axis=1)[:, None] + (two**2).sum(axis=1) - 2 * one @ two.T
    spread = np.minimum(rows["spread"][:, None], group["spread"]).astype(np.float32)
    possible = np.sqrt(square) <= np.sqrt(hashing.tolerance(spread)) + np.sqrt(hashing.HEAD)
    # Of two parts of images one is a whole: parts of two images prove nothing.
    possible &= (rows["part"] == 0)[:, None] | (group["part"] == 0)
    return possible & (group["record"] < rows["record"][:, None])


def _near_captions(group: np.ndarray, signatures: np.ndarray) -> Iterator[int]:
    for row in range(1, len(group)):
        share = (signatures[:row] == signatures[row]).mean(axis=1)
        if (share >= hashing.CAPTION_SHARE).any():
            yield int(group["record"][row])


def hashes_of(path: str, kind: str) -> np.ndarray:
    """What is compared of each record of a score file; zeros where there is nothing."""
    column = "thumbnail" if kind == "images" else "caption"
    nothing = bytes(hashing.SIDE**2)
    found = []
    with parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise ValueError(
                f"{path} has no column {column!r}: it is of an earlier version; make the scores "
                "again with `internvl-jax data score` in another folder"
            )
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                if kind == "captions":
                    found.append(hashing.caption_signature(value or ""))
                else:
                    found.append(np.frombuffer(value or nothing, np.uint8))
    width, dtype = (
        (hashing.SIDE**2, np.uint8) if kind == "images" else (hashing.WORD_HASHES, np.uint32)
    )
    return np.stack(found) if found else np.zeros((0, width), dtype)


def save(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes an array so that it appears as a whole: a worker may be run twice."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
