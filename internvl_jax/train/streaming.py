"""Checkpoints of ours read and written in pieces, for models larger than memory.

Written is what `pretrained.save_params` writes, with two differences that no reader notices: the
arrays are cut into chunks of at most 32 MiB, so that any sharding reads little more than its part,
and are not compressed, because the bits of weights hardly compress.
"""

import collections
import concurrent.futures
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from internvl_jax import rules
from internvl_jax.train.checkpoint import CheckpointCorrupt, mute_orbax, read_meta, sealed
from internvl_jax.train.digest import RunningDigest
from internvl_jax.train.pretrained import find_step

CHUNK_BYTES = 32 * 2**20
WORKERS = 3  # pieces in flight: one is read, one mixed, one written
_KEPT_BYTES = 256 * 2**20

Shape = tuple[int, ...]


class Parameter(Protocol):
    """One array that is somewhere; `read` gives it, or the part of an index of slices."""

    shape: Shape
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray: ...


# ---- reading ----------------------------------------------------------------------------------


class StoredParameter:
    """A parameter of a checkpoint on disk, verified once all of it has been read.

    shape, dtype: of the whole. read(index): the part, as a new array; what is fetched from disk are
    blocks of whole rows (entries of the leading axis), as many as one chunk holds. Raises
    CheckpointCorrupt, naming the parameter, where the disk does not give what was written.
    """

    def __init__(self, where: str, store: ts.TensorStore, digest: str, recent: "_Recent"):
        self.shape: Shape = tuple(store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self._where, self._store, self._digest, self._recent = where, store, digest, recent
        self._rows = store.chunk_layout.read_chunk.shape[0] if self.shape else 1
        self._total = self.shape[0] if self.shape else 1
        self._row_size = int(np.prod(self.shape[1:], dtype=np.int64))
        self._running = RunningDigest()
        blocks = range(-(-self._total // self._rows))
        self._unread = set(blocks)
        self._locks = [threading.Lock() for _ in blocks]

    @property
    def block_bytes(self) -> int:
        """Bytes that are in memory at once for this parameter."""
        return min(self._rows, self._total) * self._row_size * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if not self.shape:
            return self._block(0).reshape(())
        index = (slice(None),) * len(self.shape) if index is None else index
        start, stop, _ = index[0].indices(self._total)
        parts = []
        for number in range(start // self._rows, -(-stop // self._rows)):
            first = number * self._rows
            inside = slice(max(start - first, 0), min(stop - first, self._rows))
            parts.append(self._block(number)[(inside, *index[1:])])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, number: int) -> np.ndarray:
        with self._locks[number]:
            block = self._recent.get((self._where, number))
            if block is None:
                block = self._fetch(number)
                self._recent.put((self._where, number), block)
            return block

    def _fetch(self, number: int) -> np.ndarray:
        first = number * self._rows
        part = self._store[first : min(first + self._rows, self._total)] if self.shape else None
        try:
            block = np.asarray((self._store if part is None else part).read().result())
        except ValueError as error:
            reason = str(error).partition("[")[0].strip()
            raise CheckpointCorrupt(f"{self._where} cannot be read: {reason}") from error
        if number in self._unread:
            self._running.add(block, first * self._row_size)
            self._unread.discard(number)
            if not self._unread and self._running.hexadecimal() != self._digest:
                raise CheckpointCorrupt(f"{self._where} does not match its digest")
        return block


class _Recent:
    """The blocks read last, up to a few hundred MiB, shared by all parameters of a checkpoint."""

    def __init__(self) -> None:
        self._blocks: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple) -> np.ndarray | None:
        with self._lock:
            return self._blocks.get(key)

    def put(self, key: tuple, block: np.ndarray) -> None:
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > 1 and self._bytes() > _KEPT_BYTES:
                self._blocks.popitem(last=False)

    def _bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())


def open_params(path: str | Path) -> tuple[dict[str, StoredParameter], dict[str, Any]]:
    """({path: parameter}, meta) of a checkpoint, without reading any array.

    path: as for `pretrained.read_params`. Raises CheckpointError if there is no checkpoint, and
    CheckpointCorrupt where its files do not hold together.
    """
    step = find_step(path)
    meta = read_meta(step)
    directory, recent = step / "params", _Recent()
    opened = {}
    for name, leaf in meta["leaves"].items():
        if not name.startswith("params/"):
            continue
        name = name.removeprefix("params/")
        where = f"{directory}: {name}"
        try:
            store = ts.open(_stored_spec(directory, name), open=True, read=True).result()
        except ValueError as error:
            raise CheckpointCorrupt(f"{where} cannot be opened") from error
        opened[name] = StoredParameter(where, store, leaf["digest"], recent)
        found = (opened[name].shape, str(opened[name].dtype))
        if found != (tuple(leaf["shape"]), leaf["dtype"]):
            raise CheckpointCorrupt(f"{where} is {found}, not as recorded")
    return opened, meta


def _stored_spec(directory: Path, name: str) -> dict[str, Any]:
    """TensorStore's description of an array that Orbax wrote."""
    base = {"driver": "file", "path": f"{directory}/"}
    key = name.replace("/", ".")
    if (directory / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": base, "path": f"{key}/"}
    else:
        store = {"driver": "file", "path": f"{directory}/{key}/"}
    tree = json.loads((directory / "_METADATA").read_text("utf-8"))
    return {"driver": "zarr3" if tree.get("use_zarr3") else "zarr", "kvstore": store}


# ---- writing ----------------------------------------------------------------------------------


def save_params(directory: Path, parameters: Mapping[str, Parameter], **meta: Any) -> None:
    """Write parameters, read piece by piece, as a checkpoint into an existing empty directory.

    The result is what `pretrained.save_params` makes; whoever calls sees to it that an unfinished
    directory is not taken for a checkpoint (`convert.new_directory`).
    """
    handler = _PieceHandler()
    arrays = ocp.type_handlers.ArrayHandler()  # unused; Orbax warns where it is missing
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Pieces, handler), (jax.Array, arrays)
    )
    tree = rules.unflatten({name: _Pieces(p) for name, p in parameters.items()})
    writer = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    mute_orbax()
    with ocp.Checkpointer(writer) as checkpointer:
        checkpointer.save(directory / "params", args=ocp.args.PyTreeSave(tree))
    leaves = {
        f"params/{name}": {
            "shape": list(parameter.shape),
            "dtype": str(parameter.dtype),
            "digest": handler.digests[name.replace("/", ".")],
        }
        for name, parameter in parameters.items()
    }
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(directory / "meta", args=ocp.args.JsonSave(sealed(leaves, **meta)))


class _Pieces:
    """A leaf for Orbax that is no array yet."""

    def __init__(self, parameter: Parameter):
        self.parameter = parameter
        self.shape, self.dtype = parameter.shape, parameter.dtype
        self.chunk = chunk_shape(parameter.shape, parameter.dtype.itemsize)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def indices(self) -> Iterator[tuple[slice, ...] | None]:
        """Runs of whole rows, one chunk high."""
        if not self.shape:
            yield None
            return
        rest = (slice(None),) * (len(self.shape) - 1)
        for start in range(0, self.shape[0], self.chunk[0]):
            yield (slice(start, min(start + self.chunk[0], self.shape[0])), *rest)


def chunk_shape(shape: Shape, itemsize: int) -> Shape:
    """Whole rows up to `CHUNK_BYTES`; a larger row is halved along its longest axis."""
    if not shape:
        return ()
    row = int(np.prod(shape[1:], dtype=np.int64)) * itemsize
    chunk = [min(max(CHUNK_BYTES // max(row, 1), 1), max(shape[0], 1)), *shape[1:]]
    while len(chunk) > 1 and np.prod(chunk, dtype=np.int64) * itemsize > CHUNK_BYTES:
        longest = 1 + int(np.argmax(chunk[1:]))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(max(length, 1) for length in chunk)


class _PieceHandler(ocp.type_handlers.TypeHandler):
    """How Orbax writes `_Pieces`: as the arrays they stand for. Reading is that of arrays."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    def typestr(self) -> str:
        return "jax.Array"

    async def metadata(self, infos):
        raise TypeError("a streamed checkpoint is read as arrays")

    async def deserialize(self, infos, args=None):
        raise TypeError("a streamed checkpoint is read as arrays")

    def memory_size(self, values) -> list[tuple[int, int]]:
        return [(leaf.nbytes, leaf.nbytes) for leaf in values]

    async def serialize(self, values, infos, args=None):
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            self.digests[info.name] = _write(leaf, Path(info.parent_dir) / info.name)
        return []


def _write(leaf: _Pieces, directory: Path) -> str:
    """Write one array; returns its digest."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{directory}/"},
        "metadata": {"chunks": list(leaf.chunk), "compressor": None},
    }
    store = ts.open(
        spec, create=True, dtype=ts.dtype(jnp.dtype(leaf.dtype)), shape=leaf.shape
    ).result()
    running = RunningDigest()
    row = int(np.prod(leaf.shape[1:], dtype=np.int64))

    def one(index: tuple[slice, ...] | None) -> None:
        piece = leaf.parameter.read(index)
        target = store if index is None else store[index]
        written = target.write(piece, can_reference_source_data_indefinitely=True)
        running.add(piece, 0 if index is None else index[0].start * row)
        written.result()

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for done in [pool.submit(one, index) for index in leaf.indices()]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return running.hexadecimal()


def as_stored(parameter: Parameter, dtype: Any) -> Parameter:
    """The parameter in another dtype, cast piece by piece; as it is for None or an integer one."""
    own = np.dtype(parameter.dtype)
    if dtype is None or not jnp.issubdtype(own, jnp.floating) or own == jnp.dtype(dtype):
        return parameter
    return _Cast(parameter, np.dtype(jnp.dtype(dtype)))


class _Cast:
    def __init__(self, parameter: Parameter, dtype: np.dtype):
        self._parameter, self.shape, self.dtype = parameter, parameter.shape, dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._parameter.read(index).astype(self.dtype)
