"""The command line in processes of their own, to be stopped, starved and killed by tests.

A server process has imported everything and forks each run, so that a run starts at once.
"""

import itertools
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

from tests.compiling import XLA_FLAGS

CONFIG = Path(__file__).with_name("fast_config.py")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["internvl_jax.cli", "internvl_jax.train.loop", __name__])


class Run:
    """One run in a process of its own; `output()` is what it has printed so far."""

    def __init__(self, log: Path, target, *arguments):
        self._log = log
        log.touch()
        self.process = _context.Process(target=_start, args=(str(log), target, arguments))
        self.process.start()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 500) -> None:
        """Until the output contains the text; fails if the process ends without it."""
        end = time.monotonic() + timeout
        while text not in self.output():
            ended = not self.process.is_alive()
            assert not ended or text in self.output(), self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 500) -> int:
        """Exit code; negative for the signal that killed the process."""
        self.process.join(timeout)
        assert not self.process.is_alive(), self.output()
        return self.process.exitcode


def _start(log, target, arguments):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    target(*arguments)


def train(workdir, cache, overrides, fault=None, job=None):
    """`internvl-jax train` on one device, with a fault of this file prepared before it.

    job: (number of this process, number of all, port of the coordinator, {limit in seconds: value
    for the test}) of one of several processes.
    """
    # Quick to compile; the speed of the program does not matter here.
    os.environ["XLA_FLAGS"] = XLA_FLAGS
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    from internvl_jax import cli

    if fault is not None:
        FAULTS[fault[0]](*fault[1:])
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    if job is not None:
        from internvl_jax.train import processes

        number, count, port, limits = job
        for name, seconds in limits.items():
            assert hasattr(processes, name)
            setattr(processes, name, seconds)
        words += [f"--coordinator_address=localhost:{port}"]
        words += [f"--num_processes={count}", f"--process_id={number}"]
    cli.main(["train", f"--config={CONFIG}", f"--workdir={workdir}", *words])


def _nan_in_batches(*numbers):
    """The gradient is not finite for these batches of the pipeline."""
    import jax.numpy as jnp

    from internvl_jax import objectives
    from internvl_jax.data import pipelines

    build = pipelines.build
    bad = []

    def remembering(**settings):
        pipeline = build(**settings)
        bad.extend(pipeline.batch(number)["tokens"] for number in numbers)
        return pipeline

    class Objective(objectives.Language):
        def loss(self, model, outputs, batch):
            loss, metrics = super().loss(model, outputs, batch)
            hit = jnp.any(jnp.stack([jnp.all(batch["tokens"] == tokens) for tokens in bad]))
            return loss * jnp.where(hit, jnp.inf, 1.0), metrics

    pipelines.build = remembering
    objectives.OBJECTIVES["language"] = Objective


def _scaled_loss(number):
    """The loss of one batch is a hundred times what it should be."""
    import jax.numpy as jnp

    from internvl_jax import objectives
    from internvl_jax.data import pipelines

    build = pipelines.build
    found = []

    def remembering(**settings):
        pipeline = build(**settings)
        found.append(pipeline.batch(number)["tokens"])
        return pipeline

    class Objective(objectives.Language):
        def loss(self, model, outputs, batch):
            loss, metrics = super().loss(model, outputs, batch)
            return loss * jnp.where(jnp.all(batch["tokens"] == found[0]), 100.0, 1.0), metrics

    pipelines.build = remembering
    objectives.OBJECTIVES["language"] = Objective


def _jumping_clock():
    """The system clock leaps a year to and fro whenever a batch is fetched, also during saves."""
    from internvl_jax.data import stream

    real = time.time
    offset = -365.0 * 86400
    time.time = lambda: real() + offset
    fetch = stream.Reader.__next__

    def leaping(reader):
        nonlocal offset
        batch = fetch(reader)
        offset = -offset
        return batch

    stream.Reader.__next__ = leaping


def _no_file_larger_than(limit):
    """Writing beyond `limit` bytes in any file fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _bound_by_permissions():
    """Even root may no longer write where the mode of a directory forbids it."""
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    # capset(2), version 3: two words each of effective, permitted and inheritable capabilities.
    header = Header(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(ctypes.byref(header), none) == 0


def _shown_rows():
    """No fault: print a digest of every row that this process trains on."""
    import hashlib
    import itertools

    from internvl_jax.data import pipelines, stream

    iterate, fetch = pipelines.Pipeline.iterate, stream.Reader.__next__
    numbers = {}

    def numbered(pipeline, start_step=0):
        reader = iterate(pipeline, start_step)
        numbers[reader] = itertools.count(start_step)
        return reader

    def showing(reader):
        batch = fetch(reader)
        rows = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in batch["tokens"]]
        print(f"batch {next(numbers[reader])} rows {' '.join(rows)}", flush=True)
        return batch

    pipelines.Pipeline.iterate, stream.Reader.__next__ = numbered, showing


def _other_code(copy):
    """The package of this process is a copy with one more line."""
    import shutil

    from internvl_jax.train import processes

    package = Path(processes.__file__).parents[1]
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    own = Path(copy) / Path(processes.__file__).relative_to(package)
    with own.open("a", encoding="utf-8") as file:
        file.write("# patched on one host\n")
    processes.__file__ = str(own)


def _elsewhere(folder):
    """The process runs in another folder, so that relative paths lead to other files."""
    os.chdir(folder)


FAULTS = {
    "rows": _shown_rows,
    "code": _other_code,
    "elsewhere": _elsewhere,
    "nan": _nan_in_batches,
    "spike": _scaled_loss,
    "clock": _jumping_clock,
    "disk": _no_file_larger_than,
    "permissions": _bound_by_permissions,
}


def save_again_and_again(directory):
    """Restore the newest step, check it, and save one step after another until killed."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = ""
    import jax
    import numpy as np

    from internvl_jax.train import checkpoint
    from internvl_jax.train import state as states

    mesh = jax.make_mesh((1,), ("replica",))
    abstract = states.on_mesh(jax.eval_shape(lambda: numbered_state(0)), mesh)
    checkpoints = checkpoint.Checkpoints(directory, keep=3)
    for name in checkpoints.removed:
        print("removed", name, flush=True)
    restored = checkpoints.restore(abstract, strict=True)
    start = 0
    if restored is not None:
        start = int(restored[0].step)
        same = jax.tree.map(np.array_equal, restored[0], numbered_state(start))
        assert jax.tree.all(same), f"step {start} is not what was saved"
    print(f"restored {start}", flush=True)
    for step in itertools.count(start + 1):
        print(f"saving {step}", flush=True)
        checkpoints.save(numbered_state(step))


def numbered_state(step):
    """A state of 3 MB whose every array depends on the step."""
    import jax
    import jax.numpy as jnp

    from internvl_jax.train.state import TrainState

    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (512, 512))
    return TrainState(
        step=jnp.int32(step),
        trainable={"tower": {"kernel": noise}},
        frozen={"head": noise * 2},
        opt_state=({"mu": noise * 3, "count": jnp.int32(step)},),
        skipped=jnp.int32(0),
        nonfinite_in_a_row=jnp.int32(0),
    )
