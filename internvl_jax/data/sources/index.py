"""Where the records of many files lie: arrays on disk that are mapped, never read as a whole.

Scanning a file gives a row per record. What took long to scan is kept: one `<file>.idx.npz` per
file, beside it or in the cache folder, and one array of all files for a source. A file whose size
or time has changed since is scanned again.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.sources import base

CACHED_FROM = 64 * 2**20  # bytes of data; less is scanned again each time
_TOGETHER = 1 << 13  # rows that are written at a time


@dataclasses.dataclass(frozen=True)
class Scan:
    """Records found in one file.

    rows: structured array, a row per record; digest: of what the rows stand for; problems: what
    was left out, as (cause, message) pairs.
    """

    rows: np.ndarray
    digest: str
    problems: tuple[tuple[str, str], ...] = ()


class Rows:
    """Rows as a scan finds them: they wait in a temporary file, so any number of them may come."""

    def __init__(self, dtype: np.dtype):
        self._dtype, self._found = dtype, []
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the rows

    def append(self, row: tuple) -> None:
        self._found.append(row)
        if len(self._found) == _TOGETHER:
            self._flush()

    def array(self) -> np.ndarray:
        """All rows, in memory where they are few, else mapped."""
        self._flush()
        count = self._file.tell() // self._dtype.itemsize
        self._file.seek(0)
        if count * self._dtype.itemsize < CACHED_FROM:
            return np.frombuffer(self._file.read(), self._dtype)
        return np.memmap(self._file, self._dtype, "r+", shape=(count,))

    def _flush(self):
        self._file.write(np.array(self._found, self._dtype).tobytes())
        self._found.clear()


@dataclasses.dataclass(frozen=True)
class Index:
    """All records of a list of files.

    rows: the scans' rows after one another; starts: number of the first record of each file, and
    of all records; digest: changes with the files' names, sizes and records.
    """

    paths: tuple[str, ...]
    rows: np.ndarray
    starts: np.ndarray
    digest: str
    problems: tuple[tuple[str, str, str], ...]  # (path, cause, message)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def file_of(self, index: int) -> tuple[str, int]:
        """Path of the file that holds a record, and the record's number in it."""
        place = bisect.bisect_right(self._bounds, index) - 1
        return self.paths[place], index - self._bounds[place]

    @functools.cached_property
    def _bounds(self) -> list[int]:
        return self.starts.tolist()  # bisecting a list is ten times as fast as an array

    def __reduce__(self):
        # A mapped array would be copied into every worker process; its file name is enough.
        if isinstance(self.rows, np.memmap) and self.rows.filename:
            return _reopened, (str(self.rows.filename), self.rows.shape, self._rest())
        return Index, (self.paths, self.rows, *self._rest()[1:])

    def _rest(self):
        return self.paths, self.starts, self.digest, self.problems


def _reopened(name, shape, rest):
    rows = np.load(name, mmap_mode="r")
    if rows.shape != shape:
        raise RuntimeError(f"the index {name} has changed while it was in use")
    paths, starts, digest, problems = rest
    return Index(paths, rows, starts, digest, problems)


def opened(
    paths: Sequence[str], scan: Callable[[str], Scan], version: str, *, keep: bool | None = None
) -> Index:
    """The index of files, from what was kept of it or by scanning.

    scan: reads one file; version: names the kind and layout of its rows. keep: whether to keep
    what is scanned; by default from CACHED_FROM bytes of data on.
    """
    files.forget()  # a file may have been replaced under its name
    stamps = [_stamp(path) for path in paths]
    total = sum(int(stamp.split()[0]) for stamp in stamps)
    if keep is None:
        keep = total >= CACHED_FROM
    whole = _merged_place(paths, stamps, version)
    if (found := _open_merged(whole, paths)) is not None:
        return found
    if keep:
        pairs = zip(paths, stamps, strict=True)
        places = [scanned(path, scan, version, stamp) for path, stamp in pairs]
        return _merge(whole, paths, places, stamps)
    scans = [scan(path) for path in paths]
    counts = [len(s.rows) for s in scans]
    rows = scans[0].rows if len(scans) == 1 else np.concatenate([s.rows for s in scans])
    return Index(
        tuple(paths), rows, _starts(counts), _digest(paths, stamps, [s.digest for s in scans]),
        tuple((path, *p) for path, s in zip(paths, scans, strict=True) for p in s.problems),
    )


def scanned(path: str, scan: Callable[[str], Scan], version: str, stamp: str | None = None) -> str:
    """Makes sure that the scan of one file is kept, and returns where."""
    stamp = _stamp(path) if stamp is None else stamp
    place = files.beside(path, ".idx.npz")
    if _kept(place, version, stamp) is None:
        found = scan(path)
        about = json.dumps(
            {"version": version, "stamp": stamp, "digest": found.digest, "problems": found.problems}
        )
        with whole_file(place) as file:
            np.savez(file, rows=found.rows, about=np.array(about))
    return place


def _kept(place, version, stamp):
    try:
        with np.load(place) as kept:
            about = json.loads(str(kept["about"]))
            if (about["version"], about["stamp"]) != (version, stamp):
                return None
            return about
    except (OSError, ValueError, KeyError, EOFError):
        return None
    except Exception as error:  # zipfile has errors of its own for a damaged file
        if type(error).__module__ not in ("zipfile", "zlib"):
            raise
        return None


def _stamp(path):
    try:
        return files.stamp(path)
    except FileNotFoundError:
        raise ValueError(f"no data file at {path}") from None


def _starts(counts):
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _digest(paths, stamps, digests):
    """Of names, sizes and records; where the files lie and when they were copied is no part."""
    names = [
        (path.rpartition("/")[2], stamp.split()[0], digest)
        for path, stamp, digest in zip(paths, stamps, digests, strict=True)
    ]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _merged_place(paths, stamps, version):
    text = json.dumps([version, list(zip(paths, stamps, strict=True))])
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    return files.cache_folder() / name


def _open_merged(place: pathlib.Path, paths) -> Index | None:
    try:
        about = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
        rows = np.load(place.with_suffix(".npy"), mmap_mode="r")
    except (OSError, ValueError):
        return None
    starts = _starts(about["counts"])
    if len(rows) != starts[-1]:
        return None
    problems = tuple(tuple(p) for p in about["problems"])
    return Index(tuple(paths), rows, starts, about["digest"], problems)


def _merge(place: pathlib.Path, paths, kept: Sequence[str], stamps) -> Index:
    """Writes one array of all scans, a file at a time."""
    abouts, counts, kinds = [], [], []
    for name in kept:
        with np.load(name) as scan:
            abouts.append(json.loads(str(scan["about"])))
        with _stored_rows(name) as (_, count, kind):
            counts.append(count)
            kinds.append(kind)

    with whole_file(str(place.with_suffix(".npy"))) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kinds[0]), "fortran_order": False,
                  "shape": (sum(counts),)}
        np.lib.format.write_array_header_1_0(file, header)
        for name in kept:
            with _stored_rows(name) as (rows, _, _):
                shutil.copyfileobj(rows, file, 1 << 20)
    about = {
        "counts": counts,
        "digest": _digest(paths, stamps, [a["digest"] for a in abouts]),
        "problems": [(p, *x) for p, a in zip(paths, abouts, strict=True) for x in a["problems"]],
    }
    with whole_file(str(place.with_suffix(".json"))) as file:
        file.write(json.dumps(about).encode())
    return _open_merged(place, paths)


@contextlib.contextmanager
def _stored_rows(name: str) -> Iterator[tuple[IO[bytes], int, np.dtype]]:
    """(bytes, number, kind) of the rows of a kept scan, which need not fit into memory."""
    with zipfile.ZipFile(name) as kept, kept.open("rows.npy") as file:
        np.lib.format.read_magic(file)
        (count,), _, dtype = np.lib.format.read_array_header_1_0(file)
        yield file, count, dtype


@contextlib.contextmanager
def whole_file(place: str) -> Iterator[IO[bytes]]:
    """A file to write that appears as a whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(place) or ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise


class Indexed(base.Source):
    """The records of files of one kind, found through their index.

    pattern: see `files.expand`. language, caption: of the texts, see `base.texts_of`.
    """

    def __init__(
        self,
        kind: str,
        pattern: str,
        scan: Callable[[str], Scan],
        version: str,
        language: str,
        caption: str,
    ):
        self.index = opened(files.expand(pattern), scan, version)
        self.kind, self.language, self.caption = kind, language, caption

    @functools.cached_property
    def identity(self) -> str:
        name = self.index.paths[0].rpartition("/")[2]
        how = f" {self.language} {self.caption}".rstrip()
        return f"{self.kind} {name} {len(self)} {self.index.digest}{how}"

    def __len__(self) -> int:
        return len(self.index)
