"""Settings of an experiment for a topology: which mesh, how many chunks, what to keep for backward.

Candidates are ranked by what their towers' layers give when compiled alone (`layers`), and the best
three are confirmed by compiling their whole step. A search along one setting after another, not
over all combinations: meshes first, then what a layer keeps, each with the fewest chunks that fit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from internvl_jax import rules, sharding
from internvl_jax.models import config as models
from internvl_jax.models import init
from internvl_jax.models.layers import REMAT_POLICIES
from internvl_jax.plan import chips, compiling, experiment, layers, plan, topology
from internvl_jax.train import state as states

ROOM = 0.05  # of the memory that stays free
_MOMENTS = 2  # float32 arrays beside each trained parameter, as in AdamW
CONFIRMED = 3


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One choice of settings, with the estimates that rank it: bytes per device, seconds."""

    mesh: tuple[int, int, int]  # replica, fsdp, tensor
    chunks: int
    remat: str
    seconds: float
    memory: float
    fits: bool

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys and values."""
        named = zip(sharding.MESH_AXES, self.mesh, strict=True)
        mesh = {f"mesh.{axis}": size for axis, size in named}
        return {**mesh, "chunks": self.chunks, "model.remat": self.remat}

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.overrides.items())

    def __str__(self) -> str:
        seconds = f"{self.seconds:8.2f} s" if self.seconds else f"{'—':>10}"  # did not compile
        room = "" if self.fits else ", does not fit"
        return f"{seconds} {self.memory / plan.GIB:7.2f} GiB{room}  {self.flags}"


def suggest(
    config: Any, name: str, say: Callable[[str], None] = print
) -> list[tuple[Candidate, plan.Plan]]:
    """The best settings, the fastest that fits first, each with its whole plan.

    config: unlocked copies of it are changed. say: told of every candidate as it is measured.

    Raises:
        TopologyError, LibtpuError: see `topology.opened`.
    """
    with topology.opened(name) as devices:
        found = rank(config, name, devices, say)
        confirmed = []
        for candidate in found[:CONFIRMED]:
            say(f"compiling the whole step: {candidate.flags}")
            confirmed.append((candidate, plan.on(changed(config, candidate), name, devices)))
    return sorted(confirmed, key=lambda pair: (not pair[1].fits, pair[1].estimated_step_s or 0.0))


def rank(
    config: Any, name: str, devices: Sequence[Any], say: Callable[[str], None]
) -> list[Candidate]:
    """All candidates that were measured, those that fit and are fast first."""
    base = config.model.get("remat", "none")
    found = []
    for mesh in meshes(config, devices):
        found += _with_fitting_chunks(config, name, devices, mesh, base, say)
    best = min(found, key=_order)
    for policy in REMAT_POLICIES:
        if policy != base:
            found += _with_fitting_chunks(config, name, devices, best.mesh, policy, say)
    return sorted(found, key=_order)


def _order(candidate: Candidate) -> tuple[bool, float]:
    if not candidate.fits:
        return True, candidate.memory
    return False, candidate.seconds


def meshes(config: Any, devices: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Meshes over which the model divides: as much fsdp as it can take, half of that, and tensor.

    More replicas gather less but hold more; `tensor` is worth its traffic where a device holds
    few rows.
    """
    model_config = models.from_dict(config.model)
    count, found = len(devices), []
    for tensor in (1, 2, 4):
        whole = [size for size in range(count // tensor, 0, -1) if count % (size * tensor) == 0]
        choices = [(count // (fsdp * tensor), fsdp, tensor) for fsdp in whole]
        choices = [mesh for mesh in choices if _divides(config, model_config, mesh)]
        found += choices[: 2 if tensor == 1 else 1]
    return found


def _divides(config: Any, model_config: Any, mesh: tuple[int, int, int]) -> bool:
    shape = jax.sharding.AbstractMesh(mesh, sharding.MESH_AXES)
    try:
        sharding.check_divisible(model_config, shape, config.batch_size)
    except sharding.MeshError:
        return False
    return True


def _with_fitting_chunks(
    config: Any,
    name: str,
    devices: Sequence[Any],
    mesh: tuple[int, int, int],
    policy: str,
    say: Callable[[str], None],
) -> Iterator[Candidate]:
    """Measure with the config's chunks, then with the fewest that should fit."""
    rows = config.batch_size // (mesh[0] * mesh[1])
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    start = min(sizes, key=lambda n: (abs(n - config.chunks), n))
    tried = {}
    chunks = start
    for _ in range(3):
        if chunks in tried:
            break
        candidate, fixed = _measure(config, name, devices, mesh, chunks, policy)
        tried[chunks] = candidate
        say(str(candidate))
        yield candidate
        # What is not the same for any number of chunks is in proportion to a chunk's rows.
        allowed = (1 - ROOM) * chips.parse(name)[0].hbm - fixed
        by_rows = (candidate.memory - fixed) * chunks
        chunks = next((n for n in sizes if n * allowed >= by_rows), sizes[-1])


def _measure(
    config: Any,
    name: str,
    devices: Sequence[Any],
    mesh: tuple[int, int, int],
    chunks: int,
    policy: str,
) -> tuple[Candidate, float]:
    """A candidate and those bytes of it that do not depend on the chunks."""
    candidate = Candidate(mesh, chunks, policy, 0.0, 0.0, False)
    own = changed(config, candidate)
    fixed = _held(own, devices)
    limit = (1 - ROOM) * chips.parse(name)[0].hbm
    try:
        parts = layers.measure(own, name, devices)
    except compiling.OutOfMemory as error:
        return dataclasses.replace(candidate, memory=max(error.needed, fixed)), fixed
    memory = fixed + _temporaries(own, parts) * plan.GIB
    seconds = sum(part.turns * part.estimated_s for part in parts)
    found = dataclasses.replace(candidate, seconds=seconds, memory=memory, fits=memory <= limit)
    return found, fixed


def _temporaries(config: Any, parts: Sequence[layers.Layers]) -> float:
    """GiB of the largest part, or of the towers whose last chunks are held at the same time."""
    gradients = sorted((p.temp_gib for p in parts if p.part == "gradient"), reverse=True)
    together = max(1, config.held_towers) if config.chunks > 1 else 1
    return max(max(p.temp_gib for p in parts), sum(gradients[:together]))


def _held(config: Any, devices: Sequence[Any]) -> float:
    """Bytes on a device during the whole step: parameters, moments, gradients."""
    model_config = models.from_dict(config.model)
    mesh = sharding.make_mesh(**config.mesh, devices=list(devices))
    with jax.set_mesh(mesh):
        shapes = states.on_mesh(init.abstract(model_config), mesh)
    learned, _ = rules.partition(shapes, config.trainable)
    gradients = 1 if config.chunks == 1 else 2  # a chunk's, and their sum
    held = experiment.bytes_per_device(shapes)
    return held + (_MOMENTS + gradients) * experiment.bytes_per_device(learned)


def changed(config: Any, candidate: Candidate) -> Any:
    """A copy of the config with a candidate's settings."""
    own = config.copy_and_resolve_references()
    own.unlock()
    for key, value in candidate.overrides.items():
        *parents, last = key.split(".")
        node = own
        for parent in parents:
            node = node[parent]
        node[last] = value
    return own.lock()
