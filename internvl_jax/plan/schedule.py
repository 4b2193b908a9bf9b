"""How long a compiled program runs and what its chips say to one another, read off its schedule.

Two clocks run through the instructions in order: the core's, by the compiler's own cycle estimates,
and that of the links between chips. A collective takes the links when it starts; the core waits for
it where the schedule says that it must be done. That waiting is what is exposed. All times are
estimates; those of a Pallas kernel's body come from its own schedule (`kernels`).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from internvl_jax.plan import hlo
from internvl_jax.plan.chips import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BEGINNING = "async-collective-start"  # names of the fusions that begin a chain
LATENCY = 1e-6  # seconds per collective: an order of magnitude, for the many small ones


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and place: bytes sent per chip, link time, and what of it is exposed.

    All three are totals of the step.
    """

    kind: str
    bytes: float
    seconds: float
    exposed_seconds: float
    where: str
    count: float = 1

    @property
    def exposed_bytes(self) -> float:
        """Bytes of the share of time in which the core waits."""
        return self.bytes * min(1.0, self.exposed_seconds / self.seconds) if self.seconds else 0.0

    def times(self, trips: int) -> "Collective":
        """The same within a loop."""
        return dataclasses.replace(
            self,
            bytes=self.bytes * trips,
            seconds=self.seconds * trips,
            exposed_seconds=self.exposed_seconds * trips,
            count=self.count * trips,
        )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One run of a program or of a part of it, in seconds; kernels: Pallas calls not timed."""

    seconds: float
    compute_seconds: float
    collectives: tuple[Collective, ...]
    kernels: int

    def bytes_by_kind(self) -> dict[str, tuple[float, float]]:
        """kind → (bytes sent per chip, exposed bytes), the largest first."""
        kinds: dict[str, list[float]] = {}
        for c in self.collectives:
            total = kinds.setdefault(c.kind, [0.0, 0.0])
            total[0] += c.bytes
            total[1] += c.exposed_bytes
        return {k: (a, b) for k, (a, b) in sorted(kinds.items(), key=lambda item: -item[1][0])}


@dataclasses.dataclass(frozen=True)
class _Transfer:
    kind: str
    bytes: float
    seconds: float
    where: str


def read(
    text: str,
    chip: Chip,
    coordinates: Sequence[Sequence[int]],
    shape: Sequence[int],
    kernels: Mapping[str, int] | None = None,
) -> Schedule:
    """Schedule of a compiled program.

    Args:
        text: `Compiled.as_text()`.
        chip: whose clock and links count.
        coordinates: place in the torus of each partition, in the order of the mesh.
        shape: of the slice, in chips.
        kernels: instruction → cycles of one call of a Pallas kernel (`kernels.cycles`).
    """
    return _Reader(hlo.parse(text), chip, coordinates, tuple(shape), kernels or {}).run(None)


class _Reader:
    def __init__(self, program, chip, coordinates, shape, kernels):
        self.program, self.chip, self.kernels = program, chip, kernels
        self.coordinates, self.shape = coordinates, shape

    @functools.cache  # noqa: B019 - lives as long as one reading
    def run(self, computation: str | None, around: frozenset = frozenset()) -> Schedule:
        """around: chains of the computations that call this one."""
        body = self.program.computations.get(computation or self.program.entry, [])
        chains = [self._chain(line) for line in body]
        begun = {c for c, i in zip(chains, body, strict=True) if i.name.startswith(_BEGINNING)}
        # While a loop turns, steps of a collective begun before it may run in its fusions.
        passing = around - begun
        transfers = {
            i: found
            for i, line in enumerate(body)
            if chains[i] not in passing and (found := self._transfer(line))
        }
        around |= {chain for chain in chains if chain}
        starts, ends = self._windows(body, transfers)
        now = links_free = compute = 0.0
        finish: dict[int, float] = {}
        done: list[Collective] = []
        kernels = 0
        for index, line in enumerate(body):
            if index in starts:
                finish[index] = max(now, links_free) + transfers[index].seconds
                links_free = finish[index]
            inner, trips = self._inner(line, around)
            if inner is not None:
                now += trips * inner.seconds
                compute += trips * inner.compute_seconds
                done += [c.times(trips) for c in inner.collectives]
                kernels += trips * inner.kernels
            else:
                is_kernel = 'custom_call_target="tpu_custom_call"' in line.attributes
                known = self.kernels.get(line.name) if is_kernel else line.cycles
                now += (known or 0) / self.chip.clock
                compute += (known or 0) / self.chip.clock
                kernels += known is None
            for start in ends.get(index, ()):
                wait = max(0.0, finish[start] - now)
                now += wait
                sent = transfers[start]
                exposed = min(wait, sent.seconds)
                done.append(Collective(sent.kind, sent.bytes, sent.seconds, exposed, sent.where))
        return Schedule(now, compute, tuple(done), kernels)

    def _inner(self, line: hlo.Instruction, around: frozenset) -> tuple[Schedule | None, int]:
        if line.opcode == "while":
            return self.run(line.attribute("body"), around), self.program.trips(line)
        if line.opcode == "call":
            return self.run(line.attribute("to_apply"), around), 1
        if line.opcode == "conditional":
            names = [line.attribute("true_computation"), line.attribute("false_computation")]
            listed = line.attributes.partition("branch_computations={")[2].partition("}")[0]
            names += [word.strip().lstrip("%") for word in listed.split(",")]
            return max((self.run(n, around) for n in names if n), key=lambda s: s.seconds), 1
        return None, 1

    def _windows(self, body, transfers) -> tuple[set[int], dict[int, list[int]]]:
        """Where each transfer starts, and after which instruction it must be done."""
        starts: dict[object, int] = {}
        last: dict[object, int] = {}
        for index, line in enumerate(body):
            if index in transfers:
                channel = self._channel(line)
                key = channel if channel and line.opcode == "fusion" else index
                starts.setdefault(key, index)
                last[key] = index
            elif line.opcode.endswith("-done") and line.operands:
                opened = [i for i in starts.values() if body[i].name == line.operands[0]]
                if opened:
                    last[next(k for k, i in starts.items() if i == opened[0])] = index
        ends: dict[int, list[int]] = {}
        for key, start in starts.items():
            ends.setdefault(last[key], []).append(start)
        return set(starts.values()), ends

    def _collective_in(self, line: hlo.Instruction) -> hlo.Instruction | None:
        """The collective that an instruction is, or that the computation it calls holds: a fusion,
        or what a SparseCore does while the core goes on."""
        if line.opcode.removesuffix("-start") in KINDS:
            return line
        if line.opcode in ("fusion", "async-start", "call-start"):
            called = line.attribute("calls") or line.attribute("to_apply")
            for inner in self.program.computations.get(called, ()):
                if inner.opcode in KINDS:
                    return inner
        return None

    def _channel(self, line: hlo.Instruction) -> tuple[str | None, ...] | None:
        """What the fusions of one asynchronous collective share: those within a `shard_map` all
        have one channel, but chains of their own."""
        found = self._collective_in(line)
        if found is None or found.attribute("channel_id") is None:
            return None
        chain = re.search(r'chain_id="(\d+)"', found.attributes)
        return found.attribute("channel_id"), chain.group(1) if chain else None

    def _chain(self, line: hlo.Instruction) -> tuple[str | None, ...] | None:
        """Channel and chain of a fusion that holds a step of an asynchronous collective."""
        found = self._channel(line) if line.opcode == "fusion" else None
        return found if found and found[1] else None

    def _transfer(self, line: hlo.Instruction) -> _Transfer | None:
        found = self._collective_in(line)
        if found is None:
            return None
        kind = found.opcode.removesuffix("-start")
        group = hlo.first_group(found.attributes)
        devices = len(group) or len(self.coordinates)
        share = (devices - 1) / devices
        size = hlo.bytes_of(found.shape, largest=found.opcode.endswith("-start"))
        if kind == "all-reduce":
            # TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
            scattered = line.opcode == "fusion" and hlo.bytes_of(line.shape) < size / 2
            kind = "reduce-scatter" if scattered else kind
            sent = size * share * (1 if scattered else 2)
        elif kind == "reduce-scatter":
            sent = size * devices * share
        elif kind == "collective-permute":
            sent = size
        else:
            sent = size * share
        links = 1 if kind == "collective-permute" else self._links(group)
        seconds = sent / (links * self.chip.link_bandwidth) + LATENCY
        place = found.attributes.partition('op_name="')[2].partition('"')[0]
        return _Transfer(kind, sent, seconds, place)

    def _links(self, group: list[int]) -> int:
        """Links over which a chip of the group receives at once: two per closed torus axis."""
        places = [self.coordinates[i] for i in group] or list(self.coordinates)
        links = 0
        for axis, length in enumerate(self.shape):
            extent = len({place[axis] for place in places})
            closed = extent == length and length % self.chip.wrap == 0
            links += (2 if closed else 1) if extent > 1 else 0
        return max(links, 1)
