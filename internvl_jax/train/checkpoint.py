"""Checkpoints of a run: asynchronous, committed by rename, verified array by array on restore.

A step is a directory `<workdir>/checkpoints/<step>` with four items written by Orbax: `params` (one
nested dict, readable without this project), `opt_state`, `counters` and the JSON item `meta`, which
holds the step, the resolved config, the data fingerprint, versions, and shape, dtype and digest of
every array. The data position needs no item: batch i is a function of the data and i.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from internvl_jax import rules
from internvl_jax.train import processes
from internvl_jax.train.digest import digests
from internvl_jax.train.state import TrainState

_IN_PROGRESS = "*.orbax-checkpoint-tmp*"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, written or used for this model."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint on disk is not what was written; names the step and the leaf or file."""


def nested(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict, indices and field names as keys.

    So is the optimizer state stored: readable without the classes that made it.
    """
    return rules.unflatten(
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
    )


def make_meta(items: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The JSON record of a checkpoint: `fields`, versions, one entry per array, own checksum."""
    arrays = rules.flatten(items)
    digest_of = digests(dict(items))
    leaves = {
        path: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": digest_of[path]}
        for path, x in arrays.items()
    }
    return sealed(leaves, **fields)


def sealed(leaves: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """The record of arrays whose shapes, dtypes and digests are known."""
    versions = {}
    for package in ("internvl_jax", "jax", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    meta = json.loads(json.dumps({**fields, "versions": versions, "leaves": leaves}))
    return {**meta, "sha256": _checksum(meta)}


def _checksum(meta: Mapping[str, Any]) -> str:
    body = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_meta(step_directory: str | Path) -> dict[str, Any]:
    """The meta record of one step directory. Raises CheckpointCorrupt if it is damaged."""
    file = Path(step_directory) / "meta" / "metadata"
    try:
        meta = json.loads(file.read_text())
        intact = isinstance(meta, dict) and meta.get("sha256") == _checksum(meta)
    except (OSError, ValueError) as error:
        raise CheckpointCorrupt(f"{step_directory}: cannot read meta: {_line(error)}") from error
    if not intact:
        raise CheckpointCorrupt(f"{step_directory}: meta does not match its own checksum")
    return meta


def read_arrays(step_directory: str | Path, item: str, abstract: dict, meta: dict) -> dict:
    """Read an item of a checkpoint, or part of it, and verify every array.

    abstract: nested dict of ShapeDtypeStruct with shardings, all or a part of the stored leaves.
      Shapes and dtypes are those of the checkpoint, else CheckpointError.
    Raises CheckpointCorrupt, naming the leaf, where the disk does not give what was written.
    """
    directory = Path(step_directory).absolute()
    stored = {p: x for p, x in meta["leaves"].items() if p.startswith(f"{item}/")}
    wanted = rules.flatten({item: abstract})
    wrong = [f"{p}: not in the checkpoint" for p in wanted if p not in stored]
    for path in wanted.keys() & stored.keys():
        old = (tuple(stored[path]["shape"]), stored[path]["dtype"])
        new = (tuple(wanted[path].shape), str(wanted[path].dtype))
        if old != new:
            wrong.append(f"{path}: stored as {old[0]} {old[1]}, the model has {new[0]} {new[1]}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{directory} was written by another model: {'; '.join(sorted(wrong)[:4])}{more}"
        )
    if not wanted:
        return abstract
    with processes.together(CheckpointCorrupt):
        try:
            tree = _restore(directory / item, abstract)
        except Exception as error:
            leaf = _first_unreadable(directory / item, abstract)
            what = f"{directory}: cannot read {item}{leaf}: {_line(error)}"
            raise CheckpointCorrupt(what) from error
    bad = [p for p, x in digests({item: tree}).items() if x != stored[p]["digest"]]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointCorrupt(f"{directory}: {bad[0]}{more} does not match its digest")
    return tree


def _restore(directory: Path, abstract: dict) -> dict:
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    mute_orbax()
    # Not through a Checkpointer, in which a process that can read waits for one that cannot.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(directory, args=args)


def _first_unreadable(directory: Path, abstract: dict) -> str:
    """Path of the first leaf that cannot be read by itself, or "" if each can or none."""
    leaves = rules.flatten(abstract)
    unreadable = []
    for path, leaf in leaves.items():
        try:
            _restore(directory, rules.unflatten({path: leaf}))
        except Exception:
            unreadable.append(path)
    return f"/{unreadable[0]}" if 0 < len(unreadable) < len(leaves) else ""


class _ReportedElsewhere(logging.Filter):
    """Drops the tracebacks that Orbax logs for a failed read or save: we report each in one line.

    Reads that were given up log theirs when they are collected, so the filter stays for good.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            # True of every checkpoint that one process wrote as plain files.
            return "Skipping merge of OCDBT" not in record.getMessage()
        where = [record.pathname, record.getMessage()]
        if record.exc_info and record.exc_info[2]:  # a bare future's message names no file
            where += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        return "orbax" not in " ".join(where)


@dataclasses.dataclass(frozen=True)
class _WithoutStragglers:
    """An unraisable hook that drops the errors of abandoned TensorStore reads."""

    rest: Callable[[Any], None]

    def __call__(self, unraisable):
        text = f"{unraisable.exc_value} {unraisable.object}"
        if "Event loop is closed" in text or "_read_array_index" in text:
            return
        self.rest(unraisable)


@functools.cache
def mute_orbax() -> None:
    """Let Orbax report failures only through exceptions."""
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(_ReportedElsewhere())
    sys.unraisablehook = _WithoutStragglers(sys.unraisablehook)


def _line(error: BaseException) -> str:
    """The gist of an exception in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition(" See full TensorStore details")[0]
    return text if len(text) <= 200 else text[:197] + "..."


def committed_steps(directory: str | Path) -> list[int]:
    """Steps under a checkpoints directory, oldest first; unfinished ones do not count."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit() and p.is_dir())


class Checkpoints:
    """The checkpoints of one work directory; one writer at a time (see `workdir.lock`)."""

    def __init__(self, directory: str | Path, *, keep: int = 3):
        """Open or create the directory and remove what an interrupted save left there.

        Of several processes all do this and everything below together, except `close`.
        """
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        mute_orbax()
        self._keep = keep
        self._saving: int | None = None
        self.removed = processes.first(self._remove_unfinished())
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, lightweight_initialize=True)
        return ocp.CheckpointManager(self.directory, options=options)

    def _remove_unfinished(self) -> list[str]:
        if jax.process_index() != 0:
            return []
        leftovers = sorted(self.directory.glob(_IN_PROGRESS))
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        return [leftover.name for leftover in leftovers]

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return committed_steps(self.directory)

    def save(self, state: TrainState, **meta: Any) -> int:
        """Start writing the state; returns its step once the arrays are copied to the host.

        meta: what to record beside the arrays: config, data_fingerprint (JSON values).
        Waits for the save before it. A step that exists already is left as it is.
        Raises CheckpointError if this or the previous save failed; committed steps stay intact.
        """
        step = int(state.step)
        self.wait()
        if processes.first(step in self.steps()):
            return step
        items = _items(state)
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave(make_meta(items, step=step, **meta))
        self._saving = step
        error = None
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as caught:
            error = caught
        self._check(error)
        return step

    def poll(self) -> None:
        """Raise CheckpointError if the save in progress has failed; never waits.

        Several processes notice at different times; they leave it to the next `wait`.
        """
        busy = self._saving is None or self._manager.is_saving_in_progress()
        if jax.process_count() == 1 and not busy:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is committed. Raises CheckpointError if it failed."""
        if self._saving is None:
            return
        error = None
        try:
            self._manager.wait_until_finished()
        except Exception as caught:
            error = caught
        self._check(error)
        self._saving = None

    def _check(self, error: BaseException | None) -> None:
        """Raise CheckpointError if saving has failed here or on another process."""
        texts = processes.gather(None if error is None else _line(error))
        reason = next((text for text in texts if text is not None), None)
        if reason is None:
            return
        step, self._saving = self._saving, None
        with contextlib.suppress(Exception):
            self._manager.close()
        self._remove_unfinished()
        self._manager = self._open()
        free = shutil.disk_usage(self.directory).free / 2**20
        steps = ", ".join(map(str, self.steps())) or "none"
        raise CheckpointError(
            f"saving step {step} failed ({free:,.0f} MiB free in {self.directory}): "
            f"{reason}; steps on disk: {steps}"
        ) from error

    def restore(
        self, abstract: TrainState, *, strict: bool = False
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest intact step, or None if there is no step.

        abstract: `state.on_mesh` of the state of this run; arrays come back on its shardings, on
          whatever mesh they were saved.
        A damaged step is reported in one line on stderr, and the step before it is tried; with
        `strict`, or if no step is intact, CheckpointCorrupt. Damaged steps newer than the restored
        one are moved to `<directory>/../damaged`, so that their numbers are free again.
        """
        damaged = []
        for step in reversed(processes.first(self.steps())):
            directory = self.directory / str(step)
            try:
                with processes.together(CheckpointCorrupt):
                    meta = read_meta(directory)
                items = {
                    name: read_arrays(directory, name, tree, meta)
                    for name, tree in _items(abstract).items()
                }
            except CheckpointCorrupt as error:
                if strict:
                    raise
                damaged.append(step)
                processes.say(f"warning: step {step} is damaged, trying the one before: {error}")
                continue
            self._set_aside(damaged)
            return _from_items(abstract, items), meta
        if damaged:
            raise CheckpointCorrupt(
                f"no intact checkpoint in {self.directory} (damaged: {damaged}); to start again "
                "from scratch, move that directory away"
            )
        return None

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        aside = self.directory.parent / "damaged"
        aside.mkdir(exist_ok=True)
        for step in steps if jax.process_index() == 0 else ():
            target = aside / str(step)
            for number in range(1, 1000):
                if not target.exists():
                    break
                target = aside / f"{step}-{number}"
            (self.directory / str(step)).rename(target)
        processes.first(None)  # the others see it, too
        self._manager.reload()

    def close(self) -> None:
        """Finish the save in progress and release the writer, also on a process that has failed."""
        try:
            self._manager.close()
        except Exception as error:
            raise CheckpointError(f"saving step {self._saving} failed: {_line(error)}") from error


def _items(state: TrainState) -> dict[str, dict]:
    counters = {n: getattr(state, n) for n in ("step", "skipped", "nonfinite_in_a_row")}
    return {"params": state.params, "opt_state": nested(state.opt_state), "counters": counters}


def _from_items(abstract: TrainState, items: Mapping[str, dict]) -> TrainState:
    """The inverse of `_items` for a state of the structure of `abstract`."""

    def like(tree, stored):
        leaves = rules.flatten(stored)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: leaves[jax.tree_util.keystr(path, simple=True, separator="/")], tree
        )

    return TrainState(
        trainable=like(abstract.trainable, items["params"]),
        frozen=like(abstract.frozen, items["params"]),
        opt_state=like(abstract.opt_state, items["opt_state"]),
        **items["counters"],
    )
