"""The text of a compiled TPU program as data: computations, instructions, arrays, device groups.

The text is what `Compiled.as_text()` gives after scheduling, so the instructions of a computation
stand in the order in which they run.
"""

import dataclasses
import functools
import math
import re

import numpy as np

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$", re.DOTALL)
_END = re.compile(r"^\}(, execution_thread=\S+)?\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::((?:[^{}])*))?\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str | None:
        """The computation or word that an attribute such as `calls=` or `body=` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def cycles(self) -> int:
        """The compiler's estimate of the instruction alone; 0 where it has none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each a list of instructions in order; `entry` is where it starts."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def constants(self) -> dict[str, list[int]]:
        """Integer constants that each computation holds."""
        return {
            name: [int(i.operands[0]) for i in body
                   if i.opcode == "constant" and i.operands and i.operands[0].isdigit()]
            for name, body in self.computations.items()
        }  # fmt: skip

    def trips(self, loop: Instruction) -> int:
        """How often the body of a while instruction runs."""
        known = re.search(r'"?known_trip_count"?:\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        # Otherwise the bound stands in the condition, or in the fusion that computes it.
        condition = loop.attribute("condition")
        inside = [condition]
        for instruction in self.computations.get(condition, ()):
            inside.append(instruction.attribute("calls"))
        bounds = [n for name in inside if name for n in self.constants.get(name, ())]
        return max(bounds, default=1)


def parse(text: str) -> Program:
    """Read the text of a compiled module. Attributes may be broken over several lines."""
    computations: dict[str, list[Instruction]] = {}
    entry, name, pending = "", None, ""

    def finish():
        nonlocal pending
        if pending and name is not None:
            computations[name].append(_instruction(pending))
        pending = ""

    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line[0].isspace():
            finish()
            name = header.group(2)
            computations[name] = []
            entry = name if header.group(1) else entry
        elif _END.match(line):
            finish()
            name = None
        elif name is not None and re.match(r"\s+(ROOT )?%[\w.\-]+ = ", line):
            finish()
            pending = line
        elif pending:
            pending += line
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    name, rest = _INSTRUCTION.match(line).groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = tuple(
        word.split()[-1].lstrip("%") for word in _split(re.sub(r"/\*.*?\*/", "", rest[:close]))
    )
    return Instruction(name, opcode, shape, operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        if text[i] == "(":
            depth += 1
        elif text[i] == ")":
            depth -= 1
            if not depth:
                return i
    return len(text)


def _split(text: str) -> list[str]:
    """Comma-separated operands; commas within brackets belong to a shape."""
    words, depth, word = [], 0, ""
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            words.append(word)
            word = ""
        else:
            word += sign
    return [w for w in [*words, word] if w.strip()]


def bytes_of(shape: str, largest: bool = False) -> float:
    """Bytes of all arrays of a shape, or of its largest, as they lie in memory with tile padding.

    An array such as `bf16[4,25,3200]{2,1,0:T(8,128)(2,1)}` is padded in its minor axes to whole
    tiles, here 25 rows to 32.
    """
    sizes = [_array_bytes(*m.groups()) for m in _ARRAY.finditer(shape)]
    return (max if largest else sum)(sizes or [0.0])


def _array_bytes(dtype: str, dims: str, order: str | None, layout: str | None) -> float:
    bits = _BITS.get(dtype) if dtype in _BITS else int(re.sub(r"\D", "", dtype.split("e")[0]) or 0)
    sizes = [int(d) for d in dims.split(",") if d]
    tile = re.search(r"T\(([\d,]+)\)", layout or "")
    if tile and order:
        minor_first = [int(d) for d in order.split(",")]
        for extent, axis in zip(reversed(tile.group(1).split(",")), minor_first, strict=False):
            sizes[axis] = -(-sizes[axis] // int(extent)) * int(extent)
    return math.prod(sizes) * bits / 8


def first_group(attributes: str) -> list[int]:
    """Partitions of the first group that a collective joins; empty if it names none.

    Knows the three ways of writing groups: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, and
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.
    """
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    if listed:
        return [int(n) for n in listed.group(1).split(",")]
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if iota:
        groups, source, order = iota.groups()
        ids = _iota(source, order).reshape(_numbers(groups))
        return ids.reshape(-1, ids.shape[-1])[0].tolist()
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        attributes,
    )
    if not mesh:
        return []
    axes = re.findall(r"'([^']+)'=(\d+)", mesh.group(1))
    chosen = set(re.findall(r"'([^']+)'", mesh.group(4)))
    sizes = [int(n) for _, n in axes]
    source = mesh.group(2) or str(math.prod(sizes))
    ids = _iota(source, mesh.group(3)).reshape(sizes)
    return ids[tuple(slice(None) if a in chosen else 0 for a, _ in axes)].reshape(-1).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids
