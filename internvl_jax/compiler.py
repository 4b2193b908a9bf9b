"""What the TPU compiler is asked for, beyond its defaults.

What each entry brings is the compiler's estimate (docs/scale.md).
"""

from jax.experimental.pallas import tpu as pltpu

from internvl_jax import sharding

# Weights are gathered within fusions of the core, while others are used. On v5e the defaults.
_ASYNCHRONOUS: dict[str, bool | int] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

# Collectives that SparseCores do, where a chip has them: a core alone waits for every scatter of a
# gradient, and for the first gather of a layer. Not "all_reduce": on some meshes the compiler
# aborts (libtpu 0.0.42, replicas of v5p:8x8x8), and only what is scattered already is added so.
SPARSE_CORE = ("all_gather", "reduce_scatter")

# MiB of a core's vector memory that one fusion may use, by JAX's name of the chip. With the
# compiler's own 16, products have smaller tiles, which read their factors more often. With more
# than these a layer of InternViT gains nothing (v5e, v5p) or next to nothing (v6e); a TPU7x has no
# more. Public training runs set the same on v6e and TPU7x.
FUSIONS = {"v5e": 48, "v5p": 32, "v6e": 96, "7x": 64}


def options(large_fusions: bool = True) -> dict[str, bool | int] | None:
    """`compiler_options` of a train step's `jax.jit` on the devices of the current mesh.

    large_fusions: see `FUSIONS`; without them a program compiles in a third of the time.
    """
    if sharding.platform() != "tpu":
        return None
    chip, found = pltpu.get_tpu_info(), dict(_ASYNCHRONOUS)
    if chip.sparse_core is not None:
        prefix = "xla_tpu_enable_sparse_core_collective_offload_"
        found |= {prefix + kind: True for kind in SPARSE_CORE}
    fusion = FUSIONS.get(str(chip.chip_version))
    if large_fusions and fusion is not None:
        found["xla_tpu_scoped_vmem_limit_kib"] = fusion * 1024
    return found
