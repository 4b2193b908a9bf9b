"""The vector memory of a TPU core, which bounds what a kernel keeps at hand."""

from jax.experimental.pallas import tpu as pltpu

from internvl_jax.sharding import platform

MEGABYTE = 2**20


def available() -> int:
    """Bytes of the current TPU's; where a kernel is interpreted, of a large one's."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if platform() == "tpu" else 128 * MEGABYTE
