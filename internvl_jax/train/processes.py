"""Several processes that train as one: how they join, agree, and hear of one another's trouble.

On a pod every host runs the same command, and all of them step through the same program together.
So what one process alone knows (a refused work directory, a damaged file, a signal) must reach the
others before they wait for it in a collective: `together`, `first` and `Agreed` are the ways. Each
is called by all processes at the same place; with a single one they do nothing.
"""

import atexit
import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvl_jax.train.workdir import differences

JOIN_SECONDS = 60  # within which all processes must have come
HEARTBEAT_SECONDS = 60  # of silence after which a process counts as dead
LAST_SECONDS = 5  # for which process 0 outlives an error
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class ProcessError(RuntimeError):
    """The processes of a job do not fit together, or one of the others has failed."""


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """The block runs as one of the processes of a job; call it before anything else of JAX.

    The arguments are those of `jax.distributed.initialize`. What is None comes from where JAX finds
    it: JAX_COORDINATOR_ADDRESS, a Cloud TPU, Slurm or Open MPI. Where nothing is found, the block
    runs as a process on its own; so it does, without an address, in a program that has used JAX
    before (a notebook), since such a program can no longer join a job.

    Ends the process with exit code 1 if not all have come within JOIN_SECONDS. Raises ProcessError
    for arguments that do not make sense, or processes with different numbers of devices.
    """
    if not _initialize(coordinator_address, num_processes, process_id):
        yield
        return
    try:
        _count_devices()
        yield
    except Exception:
        # Not the farewell at JAX's exit, which waits for the others, while they may be waiting for
        # this process in a collective. (The last registered exit function is the first to run.)
        atexit.register(_leave)
        raise
    except SystemExit:
        jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()


def _initialize(address: str | None, count: int | None, number: int | None) -> bool:
    """Join the job; False if there is none to join."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and (count, number) != (None, None):
        raise ProcessError(
            "--num_processes and --process_id need --coordinator_address=HOST:PORT, where process "
            "0 runs and a port that is free there; on a Cloud TPU none of them is needed"
        )
    # SIGTERM belongs to `preemption.Watch`.
    jax.config.update("jax_enable_preemption_service", False)
    watch = threading.Timer(JOIN_SECONDS, _give_up, (address, count, number))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            # Ours comes first: JAX would end the process with a stack trace.
            initialization_timeout=3 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, TypeError, IndexError) as error:
        if address is None and str(error).startswith("coordinator_address should be defined"):
            return False  # no job anywhere
        raise ProcessError(f"cannot join the job at {address or 'hand'}: {error}") from error
    except RuntimeError as error:
        if not str(error).startswith("jax.distributed.initialize() must be called before"):
            raise
        if address is None:
            return False
        raise ProcessError(
            "this program has used JAX already, so it cannot join a job any more; start a process "
            "of its own with the command internvl-jax"
        ) from error
    finally:
        watch.cancel()
    return True


def _give_up(address: str | None, count: int | None, number: int | None) -> None:
    who = "this process" if number is None else f"process {number}"
    of = "the job" if count is None else f"{count}"
    print(
        f"error: {who} of {of} (on {socket.gethostname()}) has waited {JOIN_SECONDS} seconds at "
        f"{address or 'the coordinator that JAX found'}, and not all the others have come; each "
        "one that came prints this line. Start the same command for every process within a "
        "minute, and see that the coordinator's host and port can be reached",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # With this process the coordinator ends, and with it, noisily, all others: if they have
        # come to the same error, let them say so first.
        time.sleep(LAST_SECONDS)
    os._exit(1)


def _count_devices() -> None:
    """Say what the job has; every process must have as many devices as the others."""
    devices = jax.devices()
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise ProcessError(
            "the processes have different numbers of devices: "
            + ", ".join(f"process {n} has {count}" for n, count in sorted(counts.items()))
        )
    say(
        f"{jax.process_count()} processes with {jax.local_device_count()} devices each: "
        f"{len(devices)} × {devices[0].device_kind}"
    )


def say(text: str) -> None:
    """Print a line to stderr, once for all processes."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def gather(value: Any) -> list[Any]:
    """The JSON values that all processes pass, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def first(value: Any) -> Any:
    """The JSON value that process 0 passes, once all processes have come here."""
    return gather(value)[0]


@contextlib.contextmanager
def together(kind: type[Exception] = ProcessError) -> Iterator[None]:
    """If the block fails on some process, it fails on all; within it nothing is waited for.

    The processes on which it did not fail raise `kind`, with the first other one's message.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = {
        number: text
        for number, text in enumerate(gather(error and (str(error) or type(error).__name__)))
        if text is not None
    }
    if error is not None:
        raise error
    for number, text in failed.items():
        raise kind(f"process {number}: {text}")


def code_version() -> dict[str, str]:
    """Digest of this package's source files, and versions of what it stands on."""
    source = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(source.rglob("*.py")):
        digest.update(str(file.relative_to(source)).encode())
        digest.update(file.read_bytes())
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    python = platform.python_version()
    return {"internvl_jax": digest.hexdigest()[:12], "python": python, **versions}


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise ProcessError if the nested JSON values differ between processes, saying where."""
    own = {"host": socket.gethostname(), **facts}
    (zero, *others) = gather(own)
    wrong = []
    for number, other in enumerate(others, 1):
        found = {n: c for n, c in differences(zero, other).items() if n != "host"}
        if found:
            lines = [f"{n} is {there!r} instead of {here!r}" for n, (here, there) in found.items()]
            more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
            wrong.append(f"on process {number} ({other['host']}) {', '.join(lines[:4])}{more}")
    if wrong:
        more = f"; and {len(wrong) - 4} other processes differ" if len(wrong) > 4 else ""
        raise ProcessError(
            f"the processes do not run the same: {'; '.join(wrong[:4])}{more} (compared with "
            f"process 0 on {zero['host']}). Start all with the same command, code and data"
        )


def check_shared(path: Path) -> None:
    """Raise ProcessError if a directory is not the same one for all processes."""
    probe = path / f".shared-{socket.gethostname()}-{os.getpid()}"
    if jax.process_index() == 0:
        probe.touch()
    name = first(probe.name)
    seen = gather((path / name).exists())
    if jax.process_index() == 0:
        probe.unlink()
    blind = [str(number) for number, sees in enumerate(seen) if not sees]
    if blind:
        raise ProcessError(
            f"{path} of process {', '.join(blind)} is not that of process 0; the work directory "
            "must lie on a file system that all processes share, such as a mounted bucket"
        )


class Agreed:
    """The largest of the numbers that the processes pass, known to all a call later.

    Called once per train step by every process, it runs behind the step on the devices: the host
    waits for nothing that is not done. A process on its own has its answer at once.
    """

    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        own = np.full(jax.local_device_count(), number, np.int32)
        before, self._pending = self._pending, _largest(
            jax.make_array_from_process_local_data(self._place, own, (self._size,))
        )
        return 0 if before is None else int(before)


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return numbers.max()
