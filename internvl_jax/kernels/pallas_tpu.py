"""The project's Pallas TPU kernels: which one runs, and each device's part under a mesh."""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from internvl_jax.kernels import blocked_tpu, short_tpu
from internvl_jax.kernels.masks import Mask
from internvl_jax.sharding import platform

# In the order of preference; each has `supports` and `attention`. With fewer queries than the
# number beside it, a kernel does not pay and runs only where "pallas_tpu" is asked for by name: the
# short one gives each query a lane out of 128, and scores of few queries XLA keeps on the chip.
KERNELS = {short_tpu: 8, blocked_tpu: 256}


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """None, or why no kernel can run."""
    return _refusal(KERNELS, query, key, value, mask)


def supports_unasked(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """None, or why no kernel can run or pays."""
    paying = [kernel for kernel, fewest in KERNELS.items() if query.shape[1] >= fewest]
    if not paying:
        return f"{query.shape[1]} queries would leave most lanes of the kernels empty"
    return _refusal(paying, query, key, value, mask)


def _refusal(kernels, query, key, value, mask) -> str | None:
    if platform() not in ("tpu", "cpu"):
        return f"Pallas TPU kernels do not run on {platform()}"
    mesh = jax.sharding.get_abstract_mesh()
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto and mesh.shape[name] > 1:
            return f"mesh axis {name!r} is automatic; kernels need explicit or manual axes"
    batch, length, heads, dim = _spec(query)
    if length or dim:
        return f"positions or head_dim of the queries are sharded: {_spec(query)}"
    for name, array in (("key", key), ("value", value)):
        if _spec(array) != P(batch, None, heads, None):
            return f"{name} is sharded as {_spec(array)}, query as {_spec(query)}"
    reasons = [kernel.supports(query, key, value, mask) for kernel in kernels]
    return None if None in reasons else "; ".join(reasons)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    kernel = next(k for k in KERNELS if k.supports(query, key, value, mask) is None)
    interpret = platform() != "tpu"

    def local(query, key, value, mask):
        return kernel.attention(query, key, value, mask=mask, scale=scale, interpret=interpret)

    mesh = jax.sharding.get_abstract_mesh()
    axes = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if t == AxisType.Explicit}  # fmt: skip
    if not axes:
        return local(query, key, value, mask)
    spec = _spec(query)
    rows = jax.tree.map(lambda a: P(spec[0], *(None,) * (a.ndim - 1)), mask)
    mask = jax.tree.map(jax.reshard, mask, rows)
    split = jax.shard_map(
        local, in_specs=(spec, spec, spec, rows), out_specs=spec, axis_names=axes, check_vma=False
    )
    return split(query, key, value, mask)


def _spec(array: jax.Array) -> P:
    """Partition spec of an array with one entry per axis; none is sharded outside any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    found = jax.typeof(array).sharding.spec
    return P(*found, *(None,) * (array.ndim - len(found))) if not mesh.empty else P(*(None,) * 4)
