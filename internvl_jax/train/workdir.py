"""The work directory of a run: writable, owned by one run at a time, and of one experiment.

    <workdir>/config.json      the resolved config of the last run in it
              data.json        what its batches are made of, and the fingerprint of that
              checkpoints/     see `checkpoint`
              metrics.jsonl, tensorboard/
              goodput.json     see `goodput`
              lock             who is writing here now
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

# What the saved state is a state of: a change here is another experiment. All else may change on
# resume (rates, schedule, steps, intervals, evaluations, mesh, chunks, towers held); the data
# answer for themselves by their fingerprint.
FIXED = ("model", "objective", "trainable", "seed")


class WorkdirError(RuntimeError):
    """The work directory cannot be used by this run."""


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Path]:
    """Create the directory, check that it can be written, and hold its lock until the end.

    Process 0 does this for all. Raises WorkdirError if it cannot be written or another run holds
    it. The operating system releases the lock when a process dies, so what a killed run left is
    taken over with a note.
    """
    path = Path(path).absolute()
    if jax.process_index() != 0:
        yield path
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{os.getpid()}"
        probe.write_bytes(b"internvl_jax")
        probe.unlink()
    except OSError as error:
        raise WorkdirError(
            f"cannot write in work directory {path}: {error.strerror or error}; choose another "
            "--workdir, or make this one writable"
        ) from error
    with _locked(path):
        yield path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    me = {"host": socket.gethostname(), "pid": os.getpid()}
    file = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the whole run
    with file:
        holder = _read_holder(file)
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkdirError(
                f"work directory {path} is in use by {who}; wait for that run, stop it, or choose "
                "another --workdir"
            ) from None
        if holder and holder.get("host") != me["host"]:
            # A lock is not always seen across machines of a network file system.
            raise WorkdirError(
                f"work directory {path} was last held by {who}, and from here one cannot tell "
                f"whether that run has ended; if it has, delete {path / 'lock'}"
            )
        if holder:
            print(
                f"note: taking over {path} from {who}, which ended without closing it",
                file=sys.stderr,
            )
        _write_holder(file, me)
        try:
            yield
        finally:
            _write_holder(file, {})


def _read_holder(file) -> dict[str, Any]:
    file.seek(0)
    with contextlib.suppress(ValueError):
        holder = json.loads(file.read() or "{}")
        return holder if isinstance(holder, dict) else {}
    return {}


def _write_holder(file, holder: Mapping[str, Any]) -> None:
    # A full disk must not take the run down: the lock itself needs no content.
    with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(json.dumps(holder) if holder else "")
        file.flush()


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """{"a.b": (old, new)} of two nested JSON values, where they differ; None for absent."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = {}
        for name in [*old, *(n for n in new if n not in old)]:
            inner = f"{path}.{name}" if path else str(name)
            found.update(differences(old.get(name), new.get(name), inner))
        return found
    return {} if old == new else {path: (old, new)}


def _lines(changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [f"{name}: {old!r} → {new!r}" for name, (old, new) in changes.items()]


def claim(
    path: Path,
    config: Mapping[str, Any],
    fingerprint: str,
    *,
    resuming: bool,
    data_content: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and data.json; on resume first compare with those of the run before.

    config: the resolved experiment as JSON values; fingerprint: of everything that decides the
      batches; data_content: that itself, to show a difference by.
    Prints what has changed; raises WorkdirError, with the difference, for another model,
    objective, trainable set or seed, and for other data.
    """
    config = json.loads(json.dumps(config))
    before, data = _read_json(path / "config.json"), _read_json(path / "data.json")
    changes = differences(before, config) if before is not None else {}
    if resuming:
        fixed = {n: c for n, c in changes.items() if n.split(".")[0] in FIXED}
        if fixed:
            raise WorkdirError(
                f"{path} holds another experiment: {'; '.join(_lines(fixed))}. Choose another "
                "--workdir; to start from these weights, name them in config.init_from"
            )
        if data is not None and data.get("fingerprint") != fingerprint:
            cause = {n: c for n, c in changes.items() if n.split(".")[0] in ("data", "batch_size")}
            if data.get("content") and data_content is not None:
                cause |= differences(data["content"], data_content)
            what = "; ".join(_lines(cause)) or "the same config now reads other records"
            raise WorkdirError(
                f"the data of the run in {path} have changed, so it cannot go on as it began: "
                f"{what} (fingerprint {str(data.get('fingerprint'))[:12]} → {fingerprint[:12]}). "
                "Restore the data, or start in another --workdir with init_from"
            )
        for line in _lines(changes):
            print(f"config changed on resume: {line}", file=sys.stderr)
    _write_json(path / "config.json", config)
    told = {} if data_content is None else {"content": data_content}
    _write_json(path / "data.json", {"fingerprint": fingerprint, **told})


def _read_json(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        with contextlib.suppress(ValueError):
            value = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(value, dict):
                return value
        print(f"warning: {file} is damaged and was not compared", file=sys.stderr)
    return None


def _write_json(file: Path, value: Any) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)
