"""Parameters from and to checkpoints, apart from the run that made them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from internvl_jax import rules
from internvl_jax.models.positions import resize_position_embedding
from internvl_jax.train import processes
from internvl_jax.train.checkpoint import (
    CheckpointError,
    committed_steps,
    make_meta,
    read_arrays,
    read_meta,
)

POSITIONS = "vit/position_embedding"
TOWERS = ("vit/", "llama/", "llm/")


def find_step(path: str | Path) -> Path:
    """The step directory that a path means: itself, or the newest of a run or of `checkpoints/`.

    Raises CheckpointError if there is none.
    """
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        steps = committed_steps(directory)
        if steps:
            return directory / str(steps[-1])
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path} {what}; name a work directory, its checkpoints folder or one step in it"
    )


def read_params(
    path: str | Path,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    dtype: Any = None,
) -> tuple[dict, dict[str, Any]]:
    """(params, meta) of a checkpoint, every array verified; meta["config"] is its experiment.

    shardings: where each array is to lie, by path; each device then reads little more than its
      part. What has none lies whole on each device of the current mesh, or on the first device.
    dtype: of floating-point arrays, cast one by one as they come; None keeps what is stored.
    Raises CheckpointCorrupt if the checkpoint is damaged, CheckpointError if there is none.
    """
    directory = find_step(path)
    meta = read_meta(directory)
    mesh = jax.sharding.get_mesh()
    whole = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not mesh.empty:
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    wanted = {
        p: jax.ShapeDtypeStruct(shape, stored, sharding=(shardings or {}).get(p, whole))
        for p, (shape, stored) in _stored(meta).items()
    }
    if dtype is None:
        return read_arrays(directory, "params", rules.unflatten(wanted), meta), meta
    params = {}
    for name, leaf in wanted.items():
        one = read_arrays(directory, "params", rules.unflatten({name: leaf}), meta)
        array = rules.flatten(one)[name]
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        params[name] = array.astype(dtype) if floating else array
    return rules.unflatten(params), meta


def read_experiment(path: str | Path) -> dict[str, Any]:
    """The config of the run that made a checkpoint, without reading arrays."""
    return read_meta(find_step(path))["config"]


def save_params(path: str | Path, params: dict, **meta: Any) -> Path:
    """Write parameters alone as a checkpoint that `read_params` and `load_params` read.

    path: the directory to make; it appears only once it is complete, and must not exist.
    meta: what to record beside the arrays, such as config (JSON values).
    """
    path = Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already; choose another place or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    args = ocp.args.Composite(
        params=ocp.args.PyTreeSave(params),
        meta=ocp.args.JsonSave(make_meta({"params": params}, **meta)),
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(path, args=args)
    return path


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_params` found.

    params: nested dict of the parameters found, on the shardings asked for.
    sources: {path: checkpoint it came from, with a word on resizing}.
    fresh: paths that no checkpoint has, or only with another shape.
    misfits: {path: (stored shape, wanted shape)} of the latter.
    """

    params: dict
    sources: dict[str, str]
    fresh: list[str]
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        lines = []
        for source in dict.fromkeys(self.sources.values()):
            paths = [p for p, s in self.sources.items() if s == source]
            lines.append(f"from {source}: {len(paths)} arrays ({_summary(paths)})")
        for path, (stored, wanted) in self.misfits.items():
            lines.append(f"not taken: {path} is stored as {stored}, the model has {wanted}")
        if self.fresh:
            lines.append(f"initialised: {len(self.fresh)} arrays ({_summary(self.fresh)})")
        return "\n".join(lines)


def _summary(paths: Sequence[str]) -> str:
    tops: dict[str, int] = {}
    for path in paths:
        top = path.split("/")[0]
        tops[top] = tops.get(top, 0) + 1
    return ", ".join(f"{top}/… {n}" if n > 1 else top for top, n in sorted(tops.items()))


def load_params(sources: Sequence[Mapping[str, Any]], abstract: dict) -> Loaded:
    """Take each parameter from the first checkpoint that has it with a fitting shape.

    sources: `config.init_from`: dicts with `path` and, optionally, `rename`, a sequence of (regex,
      replacement): the first regex that matches a stored path whole gives the parameter its name
      here; a parameter without a match keeps its own.
    abstract: the model's parameters with shardings (`state.on_mesh`); arrays are cast to its
      dtypes. A position embedding of another grid is resized.

    Raises CheckpointError, before any array is read, for a source without a checkpoint or of which
    nothing fits, and for a part of a tower that is there with another shape only;
    CheckpointCorrupt for damage.
    """
    wanted = rules.flatten(abstract)
    plans: list[tuple[Path, Mapping[str, Any], dict[str, tuple]]] = []
    claimed: set[str] = set()
    misfits: dict[str, tuple] = {}
    for source in sources:
        with processes.together(CheckpointError):
            directory = find_step(source["path"])
            meta = read_meta(directory)
        processes.check_same({f"init_from {source['path']}": meta["sha256"]})
        taken: dict[str, tuple[str, jax.ShapeDtypeStruct]] = {}
        matched = False
        for stored, (shape, dtype) in _stored(meta).items():
            path = _renamed(stored, source.get("rename", ()))
            if path not in wanted:
                continue
            fits = tuple(wanted[path].shape) == shape
            resizable = path == POSITIONS and _resizable(shape, wanted[path].shape)
            matched |= fits or resizable
            if path in claimed or path in taken:
                continue
            if not fits and not resizable:
                misfits[path] = (shape, tuple(wanted[path].shape))
                continue
            sharding = wanted[path].sharding if fits else _whole(wanted[path].sharding)
            taken[path] = (stored, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))
        if not matched:
            raise CheckpointError(
                f"init_from: nothing in {directory} fits this model; it holds "
                f"{_summary(list(_stored(meta)))}, the model {_summary(list(wanted))}"
            )
        claimed |= set(taken)
        plans.append((directory, meta, taken))
    misfits = {path: shapes for path, shapes in misfits.items() if path not in claimed}
    _check_towers(misfits)

    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for directory, meta, taken in plans:
        part = rules.unflatten(dict(taken.values()))
        arrays = rules.flatten(read_arrays(directory, "params", part, meta))
        for path, (stored, _leaf) in taken.items():
            found[path], how = _fitted(arrays[stored], wanted[path])
            origin[path] = f"{directory}{how}"
    fresh = [path for path in wanted if path not in found]
    return Loaded(rules.unflatten(found), origin, fresh, misfits)


def _check_towers(misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Refuses a tower of which a part has another shape: its other layers could not work with it.

    The usual causes are another vocabulary and another number of key/value heads.
    """
    inside = [path for path in misfits if path.startswith(TOWERS)]
    if inside:
        lines = "".join(
            f"\n    {path}: stored as {misfits[path][0]}, the model has {misfits[path][1]}"
            for path in inside
        )
        raise CheckpointError(
            f"init_from: a tower is stored with other shapes:{lines}\nName a checkpoint of these "
            "shapes, give the model those of the checkpoint (its vocabulary comes with its own "
            "data.tokenizer), or, to start them at random, rename them to a name that the model "
            "does not have"
        )


def _stored(meta: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{parameter path: (shape, dtype)} of a checkpoint."""
    return {
        path.removeprefix("params/"): (tuple(leaf["shape"]), jnp.dtype(leaf["dtype"]))
        for path, leaf in meta["leaves"].items()
        if path.startswith("params/")
    }


def _renamed(path: str, rename: Sequence[tuple[str, str]]) -> str:
    for regex, replacement in rename:
        match = re.fullmatch(regex, path)
        if match:
            return match.expand(replacement)
    return path


def _resizable(stored: Sequence[int], wanted: Sequence[int]) -> bool:
    """Both are [1 + a square number of patches, same width]."""
    square = all(math.isqrt(s[0] - 1) ** 2 == s[0] - 1 for s in (stored, wanted))
    return square and stored[1] == wanted[1]


def _whole(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _fitted(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> tuple[jax.Array, str]:
    how = ""
    if array.shape != wanted.shape:
        old, new = (math.isqrt(n - 1) for n in (array.shape[0], wanted.shape[0]))
        array = resize_position_embedding(array, (new, new))
        how = f" (resized {old}×{old} → {new}×{new})"
    return jax.device_put(array.astype(wanted.dtype), wanted.sharding), how
