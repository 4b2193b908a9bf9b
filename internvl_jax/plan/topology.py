"""Devices of a TPU pod that only the compiler knows: libtpu, one process at a time."""

import contextlib
import fcntl
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl_jax.plan import chips

INSTALL = "pip install 'internvl-jax[plan]'"


class LibtpuError(RuntimeError):
    """The TPU compiler is not installed, or refuses to start."""


@contextlib.contextmanager
def opened(topology: str) -> Iterator[list[Any]]:
    """Compile-only devices of a topology such as "v5e:16x16", in JAX's order.

    Only one process at a time may use the compiler: the second waits here and says so.

    Raises:
        TopologyError: no such topology.
        LibtpuError: libtpu is missing (with the command that installs it) or does not start.
    """
    chips.parse(topology)  # a wrong name is refused without waiting
    _check_installed()
    with _one_at_a_time():
        yield devices(topology)


def devices(topology: str) -> list[Any]:
    """As `opened`, for a process that another one with the compiler waits for."""
    chip, shape = chips.parse(topology)
    options: dict[str, Any] = dict(chip.options)
    if max(shape) == 1:  # a host of one chip; the compiler expects four
        options["chips_per_host_bounds"] = (1, 1, 1)
    _check_installed()
    # Read when libtpu loads. Nothing here looks for a TPU or for a cloud's metadata.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # The lock of `opened` does what libtpu's own would, which fails where that one waits.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:
        raise LibtpuError(f"libtpu does not give topology {topology}: {error}") from error
    return list(described.devices)


def _check_installed() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise LibtpuError(f"planning needs the TPU compiler, libtpu; install it with: {INSTALL}")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    path = Path(tempfile.gettempdir()) / f"internvl_jax_plan_{os.getuid()}.lock"
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            print(
                f"another plan is using the TPU compiler (process {holder}); waiting for it",
                file=sys.stderr,
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
