"""State dicts that `torch.save` wrote (.pth, .bin), read without torch and without running code.

Such a file is a zip archive, uncompressed: `data.pkl` describes the tensors, `data/0`, `data/1`, …
are their bytes. A pickle may name any function of any module and have it called. Here it gets
stand-ins for the few that describe tensors, and asking for anything else ends the reading; nothing
of the file is executed. Tensors are then found by place, and need be read no earlier than wanted.
"""

import collections
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SUFFIXES = (".pth", ".pt", ".bin")
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
WRAPPERS = ("module", "model", "state_dict")  # keys under which training programs put the weights
MAX_PICKLE_BYTES = 100_000_000
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


class Unreadable(ValueError):
    """Why a file is not a state dict that can be read."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its bytes start `offset` bytes into the file, in row-major order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class _Storage:
    """Stands for the bytes of one archive entry, in elements of one dtype."""

    __slots__ = ("dtype", "length", "offset")

    def __init__(self, dtype: np.dtype, offset: int, length: int):
        self.dtype, self.offset, self.length = dtype, offset, length


class _Tensor:
    """Stands for a tensor."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any):
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


_NAMES = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    """Builds dicts, numbers, strings and the stand-ins; refuses every other name."""

    def __init__(self, file: Any, entries: dict[str, tuple[int, int]]):
        super().__init__(file)
        self._entries = entries

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) not in _NAMES:
            raise Unreadable(
                f"its pickle asks for {module}.{name}, which could run code and is refused; save "
                "the plain state dict, best as safetensors"
            )
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or key not in self._entries:
            raise Unreadable(f"its pickle refers to {pid!r}, which is no storage in the file")
        offset, size = self._entries[key]
        return _Storage(dtype, offset, size // dtype.itemsize)


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor's place in `path`. Raises Unreadable, with the reason."""
    if not zipfile.is_zipfile(path):
        raise Unreadable("it is no archive of torch.save (PyTorch 1.6 or newer); save it again")
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1 or archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
            raise Unreadable("it has no readable data.pkl, as every file of torch.save does")
        prefix = pickles[0].removesuffix(".pkl") + "/"
        entries = {
            entry.filename.removeprefix(prefix): _place(entry, file, path.stat().st_size)
            for entry in archive.infolist()
            if entry.filename.startswith(prefix)
        }
        with archive.open(pickles[0]) as stream:
            try:
                content = _Unpickler(stream, entries).load()
            except Unreadable:
                raise
            except Exception as error:  # a damaged pickle can raise nearly anything
                raise Unreadable(f"its pickle is damaged: {error!r}") from error
    return {name: _stored(name, tensor) for name, tensor in _state_dict(content).items()}


def _place(entry: zipfile.ZipInfo, file: Any, total: int) -> tuple[int, int]:
    """(offset, size) of an entry's bytes."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Unreadable(f"{entry.filename} is compressed, which torch.save does not do")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise Unreadable(f"{entry.filename} is not where the archive says")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = entry.header_offset + _LOCAL_HEADER + lengths
    if offset + entry.file_size > total:
        raise Unreadable(f"{entry.filename} ends beyond the file; was a download cut short?")
    return offset, entry.file_size


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The tensors by name, taken out of a training program's wrapper."""
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise Unreadable("it holds no dictionary of tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise Unreadable("it holds no dictionary of tensors by name")
    return tensors


def _stored(name: str, tensor: _Tensor) -> Stored:
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    numbers = [tensor.offset, *shape, *stride]
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unreadable(f"{name!r} is not described as a tensor")
    size, expected = 1, []
    for length in reversed(shape):
        expected.insert(0, size)
        size *= length
    moved = [n for n, length in enumerate(shape) if length > 1 and stride[n] != expected[n]]
    if len(stride) != len(shape) or (moved and size):
        raise Unreadable(f"{name!r} is a view with other strides; save contiguous tensors")
    if tensor.offset + size > storage.length:
        raise Unreadable(f"{name!r} of shape {tuple(shape)} is larger than its storage")
    offset = storage.offset + tensor.offset * storage.dtype.itemsize
    return Stored(tuple(shape), storage.dtype, offset)
