"""What is known about each TPU, and the topologies that exist: the one table of constants.

Sources:
  peak, hbm_bandwidth, links: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and
    "TPU7x (Ironwood)". Those pages give the interchip bandwidth of all links in both directions
    (v4 300, v5e 400, v5p 1200, v6e 800, TPU7x 1200 GB/s); `link_bandwidth` is one link, one way.
  hbm: what the compiler grants a program; stands in its out-of-memory error (libtpu 0.0.42).
  clock: v4 from Jouppi et al. 2023, Table 4; the others from the peak, which is
    2 · clock · (multipliers per device), with 4 (v5e), 8 (v5p) arrays of 128² and 4 (v6e) of 256²;
    for TPU7x from the compiler's cycle count of a large matrix product at that share of the peak
    which the other chips reach.
"""

import dataclasses
import difflib
import math


class TopologyError(ValueError):
    """A chip or topology that does not exist."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU. All figures are per JAX device, which is a chip but for TPU7x half of one.

    peak: bfloat16 FLOP/s; clock: cycles per second of the compiler's estimates; hbm: bytes that a
    program may use; hbm_bandwidth, link_bandwidth (one link, one direction): bytes/s.
    dimensions: of the torus. wrap: a torus axis of this length or a multiple of it is closed.
    """

    name: str
    peak: float
    clock: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    dimensions: int
    wrap: int
    max_chips: int
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()  # of `get_topology_desc`


GIB = 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        # Both cores of a v4 chip work as one device only if asked to.
        Chip("v4", 275e12, 1.05e9, 30.75 * GIB, 1228e9, 50e9, 3, 4, 4096,
             options=(("chip_config_name", "megacore"),)),
        Chip("v5e", 197e12, 1.5e9, 15.75 * GIB, 819e9, 50e9, 2, 16, 256),
        Chip("v5p", 459e12, 1.75e9, 95.74 * GIB, 2765e9, 100e9, 3, 4, 8960),
        Chip("v6e", 918e12, 1.75e9, 31.25 * GIB, 1638e9, 100e9, 2, 16, 256),
        Chip("tpu7x", 1153.5e12, 2.4e9, 94.75 * GIB, 3690e9, 100e9, 3, 4, 9216,
             devices_per_chip=2),
    )
}  # fmt: skip

# Slices that Google Cloud offers: all 2-D ones, and the 3-D ones up to 512 chips. Larger 3-D slices
# are multiples of 4 in each direction.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


def topologies() -> list[str]:
    """Names of the topologies to show to a reader."""
    return [
        f"{chip.name}:{shape}"
        for chip in CHIPS.values()
        for shape in (FLAT if chip.dimensions == 2 else CUBES)
    ]


def parse(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """"v5e:16x16" → the chip and the shape of the slice in chips.

    Raises:
        TopologyError: unknown chip, or a shape that no slice of it has; lists what exists.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(topology, topologies(), 3, 0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise TopologyError(
            f"unknown TPU {name!r} in topology {topology!r}; {hint}chips: {', '.join(CHIPS)}; "
            f"topologies: {', '.join(topologies())}"
        )
    chip = CHIPS[name]
    known = FLAT if chip.dimensions == 2 else CUBES
    sizes = tuple(int(word) for word in shape.split("x") if word.isdigit())
    large = (
        chip.dimensions == len(sizes) == 3
        and all(size % 4 == 0 for size in sizes)
        and math.prod(sizes) <= chip.max_chips
        and shape == "x".join(map(str, sizes))
    )
    if shape not in known and not large:
        more = ", and larger ones in multiples of 4 per side" if chip.dimensions == 3 else ""
        listed = ", ".join(f"{name}:{s}" for s in known)
        raise TopologyError(f"no topology {topology!r}; {name} has {listed}{more}")
    return chip, sizes
