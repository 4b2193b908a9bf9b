"""safetensors files and directories, read lazily and written in shards, without torch.

A safetensors file is an 8-byte little-endian header length, a JSON header that gives each
tensor's dtype, shape and byte range, and the bytes. Files are memory-mapped: opening costs one
header, a tensor costs nothing until its bytes are touched. A header is checked completely before
any tensor is handed out, because a file that lies about its sizes would otherwise surface much
later as wrong numbers or a crash.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import json
import mmap
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from internvl_jax.convert import torch_files

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself
SHARD_BYTES = 5_000_000_000
READ_AHEAD = 2  # tensors read while one is written
# What a directory's weights are called, in order of preference; an index has ".index.json" more.
FILES = ("*.safetensors", "pytorch_model*.bin", "*.pth")


class FileError(ValueError):
    """A checkpoint file or directory that cannot be read as what it claims to be."""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return _size(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    spec: Spec
    file: Path
    offset: int  # of the tensor's first byte, from the start of the file


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one file or of one directory of shards, by name.

    Indexing gives a read-only array that views the file; `specs` gives shapes and dtypes without
    touching any tensor.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens `path`: a .safetensors file, or a directory with one, several or an index.

        Files of torch.save (.pth, .bin; see `torch_files`) are read in the same way; in a directory
        where there is no .safetensors file, and by the name that Hugging Face gives them.

        Raises FileError, naming the file, where a header or an index does not hold together.
        """
        self.path = Path(path)
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: dict[str, _Place] = {}
        for file in _files(self.path):
            for name, place in _places_in(file).items():
                if name in self._places:
                    raise FileError(
                        f"{name!r} is both in {self._places[name].file} and in {file}; "
                        "keep one of the two files, or add the index that says which counts"
                    )
                self._places[name] = place
        self.specs: dict[str, Spec] = {name: place.spec for name, place in self._places.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        spec = place.spec
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        if place.file not in self._maps:
            with open(place.file, "rb") as file:
                self._maps[place.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(
            self._maps[place.file], spec.dtype, count=_size(spec.shape), offset=place.offset
        )
        return flat.reshape(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in reading order."""
        return list(dict.fromkeys(place.file for place in self._places.values()))


def holds_weights(path: Path) -> bool:
    """Whether `path` is a file of torch weights, or a directory with one."""
    if path.is_file():
        return path.suffix in (".safetensors", *torch_files.SUFFIXES)
    return any(any(path.glob(pattern)) for pattern in FILES)


def _size(shape) -> int:
    """Number of elements as a Python integer, which cannot overflow as numpy's product can."""
    size = 1
    for length in shape:
        size *= length
    return size


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileError(f"{path} does not exist")
    for pattern in FILES:
        indices = sorted(path.glob(f"{pattern}.index.json"))
        if len(indices) > 1:
            raise FileError(f"{path} has several indices: {', '.join(i.name for i in indices)}")
        if indices:
            return _indexed_files(indices[0])
        files = sorted(path.glob(pattern))
        if files:
            return files
    raise FileError(f"{path} has no file {' or '.join(FILES)}")


def _places_in(path: Path) -> dict[str, _Place]:
    """Every tensor's place in a file of either kind."""
    if path.suffix not in torch_files.SUFFIXES:
        return _read_header(path)
    try:
        stored = torch_files.read_header(path)
    except (torch_files.Unreadable, zipfile.BadZipFile) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    return {name: _Place(Spec(t.shape, t.dtype), path, t.offset) for name, t in stored.items()}


def _indexed_files(index: Path) -> list[Path]:
    """The shards that `index` names, after checking that index and shards agree on every key."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{index} is not a safetensors index: {error!r}") from error
    problems, files = [], []
    for name in sorted(by_file):
        file = index.parent / name
        if Path(name).name != name:
            problems.append(f"{name!r} is not a plain file name")
        elif not file.is_file():
            problems.append(f"{name} is missing ({len(by_file[name])} tensors)")
        else:
            files.append(file)
            here = set(_places_in(file))
            problems += [f"{key!r} is not in {name}" for key in sorted(by_file[name] - here)]
            problems += [f"{key!r} of {name} is not in it" for key in sorted(here - by_file[name])]
    if problems:
        raise FileError(f"{index} does not fit its files:\n  " + "\n  ".join(problems))
    return files


def _read_header(path: Path) -> dict[str, _Place]:
    """Every tensor's place in `path`; raises FileError unless the ranges tile the file exactly."""

    def fail(reason: str):
        raise FileError(f"{path} is not a sound safetensors file: {reason}")

    total = path.stat().st_size
    if total < 8:
        fail(f"it has {total} bytes, fewer than the 8 of the header length")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, total - 8):
            fail(f"its header claims {length} bytes of {total}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            fail(f"its header is not readable: {error}")
    if not isinstance(header, dict):
        fail("its header is not an object")
    header.pop("__metadata__", None)
    data = total - 8 - length
    places, ranges = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            fail(f"{name!r} lacks dtype, shape or data_offsets")
        if dtype not in DTYPES:
            fail(f"{name!r} has the unknown dtype {dtype!r}")
        numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            fail(f"{name!r} has a shape or offsets that are not natural numbers")
        spec = Spec(tuple(shape), DTYPES[dtype])
        if len(shape) > 32 or end - begin != spec.nbytes:
            fail(f"{name!r} of shape {shape} and dtype {dtype} cannot have {end - begin} bytes")
        if end > data:
            fail(f"{name!r} ends {end - data} bytes beyond the file; was a download cut short?")
        places[name] = _Place(spec, path, 8 + length + begin)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin < position:
            fail(f"{name!r} overlaps the tensor before it")
        if begin > position:
            fail(f"{begin - position} bytes before {name!r} belong to no tensor")
        position = end
    if position != data:
        fail(f"its last {data - position} bytes belong to no tensor")
    return places


def _unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def write(
    directory: str | os.PathLike,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes the tensors named in `specs` into an existing directory and returns the file names.

    `read(name)` is called once per tensor, from a few threads that run ahead of the writing, so
    that only a few tensors need be in memory. More than `shard_bytes` of tensors become several
    files and an index.
    """
    directory = Path(directory)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        count = len(shards)
        files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, {name: specs[name] for name in names}, read)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(spec.nbytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, "utf-8")
    return files


def _write_file(path: Path, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]) -> None:
    # Wide dtypes first keeps every tensor aligned to its own item size.
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    header: dict = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        spec = specs[name]
        end = position + spec.nbytes
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, array in _ahead(read, names):
            array = np.ascontiguousarray(array).reshape(specs[name].shape)
            if array.dtype != specs[name].dtype:
                raise ValueError(f"{name!r} was announced as {specs[name]}, came as {array.dtype}")
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _ahead(
    read: Callable[[str], np.ndarray], names: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, read(name)) in order, while the next ones are read already."""
    pending: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(READ_AHEAD) as pool:
        try:
            for name in names:
                pending.append((name, pool.submit(read, name)))
                if len(pending) > READ_AHEAD:
                    first, result = pending.popleft()
                    yield first, result.result()
            while pending:
                first, result = pending.popleft()
                yield first, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary directory that becomes `path` when the block ends without an exception.

    Whatever interrupts the block, `path` is either complete or absent; what a killed process left
    behind is named `.<name>.partial` and is cleared by the next attempt.

    Raises FileExistsError where `path` already holds something, and FileError where another
    process is writing the same directory.
    """
    path = Path(os.path.abspath(path))
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; choose another name or move it away")
    partial = path.parent / f".{path.name}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    # The kernel drops the lock with the process, so a killed writer blocks nobody.
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(f"another process is writing {path}") from error
        _clear(partial)
        try:
            yield partial
            os.fsync(descriptor)
            os.rename(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _clear(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
