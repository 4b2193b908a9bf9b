"""Attention on a fused projection's own output, QK-normalisation included."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from internvl_jax.kernels import qkv_tpu, qkv_xla
from internvl_jax.kernels.attention import attention, choose, is_plain
from internvl_jax.kernels.masks import Full, Mask
from internvl_jax.sharding import platform, spec

log = logging.getLogger(__name__)
IMPLEMENTATIONS = ("pallas_tpu", "xla", "reference")


def attention_qkv(
    qkv: jax.Array,
    *,
    num_heads: int,
    qk_norm: tuple[jax.Array, jax.Array] | None = None,
    eps: float = 1e-6,
    mask: Mask | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Self-attention on queries, keys and values that lie beside one another.

    Args:
        qkv: [B, T, 3·H·D], all queries, then all keys, then all values; head h of each is its
            columns h·D … (h + 1)·D.
        num_heads: H.
        qk_norm: weights [H·D] of the RMSNorm of queries and of keys, over the full width;
            statistics in float32, cast back before the weight. None leaves them as they are.
        eps: of both norms.
        mask: what each token sees (`kernels.masks`); everything by default.
        implementation: "pallas_tpu", "xla" or "reference"; None takes the first that can.

    Returns:
        [B, T, H·D] in the dtype of `qkv`.

    Raises:
        ValueError: unknown implementation, columns that do not divide into heads, or a named
            implementation that cannot take these arguments, with the reason.
    """
    mask = Full() if mask is None else mask
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attention implementation {implementation!r}: choose from {list(IMPLEMENTATIONS)}"
        )
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"{qkv.shape[-1]} columns are not queries, keys and values of {num_heads} heads"
        )
    if implementation == "pallas_tpu" or (implementation is None and not is_plain()):
        reason = _refusal(qkv, num_heads, mask)
        if implementation == "pallas_tpu" and reason is not None:
            raise ValueError(f"attention implementation 'pallas_tpu' cannot run: {reason}")
        # By name it runs on a CPU too, interpreted.
        chosen = implementation or ("pallas_tpu" if reason is None else "xla")
        if implementation is None and platform() == "tpu":
            _say_once(chosen, platform(), qkv.shape[1:], reason)
        if chosen == "pallas_tpu" and (implementation or platform() == "tpu"):
            kernel = functools.partial(qkv_tpu.attention, interpret=platform() != "tpu")
            return _on_each_device(kernel, qkv, num_heads, qk_norm, eps)
    return _composed(qkv, num_heads, qk_norm, eps, mask, implementation)


def _refusal(qkv: jax.Array, num_heads: int, mask: Mask) -> str | None:
    """Why the kernel cannot run; None where it can."""
    if platform() not in ("tpu", "cpu"):
        return f"Pallas TPU kernels do not run on {platform()}"
    if not isinstance(mask, Full):
        return f"the kernel has no mask {type(mask).__name__}"
    reason = _spread(qkv) or qkv_tpu.supports(qkv, num_heads)
    if reason is None and platform() == "tpu":
        wanted, there = qkv_tpu.memory(qkv), pltpu.get_tpu_info().vmem_capacity_bytes
        if wanted > there:
            reason = (
                f"{qkv.shape[1]} tokens of {qkv.shape[2]} columns want {wanted >> 20} MiB of the "
                f"core's memory, which has {there >> 20}"
            )
    return reason


def _spread(qkv: jax.Array) -> str | None:
    """Why devices cannot each compute their own rows; None where they can."""
    mesh = jax.sharding.get_abstract_mesh()
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto and mesh.shape[name] > 1:
            return f"mesh axis {name!r} is automatic; kernels need explicit or manual axes"
    if any(_spec(qkv)[1:]):
        return f"positions or columns are sharded: {_spec(qkv)}"
    return None


def _spec(array: jax.Array) -> tuple:
    return tuple(jax.typeof(array).sharding.spec)


@functools.cache
def _say_once(name: str, where: str, shape: tuple[int, ...], reason: str | None) -> None:
    because = f" (pallas_tpu: {reason})" if reason else ""
    log.info("fused attention on %s, %s × %s: %s%s", where, *shape, name, because)


def _on_each_device(attend, qkv, num_heads, qk_norm, eps):
    """`attend` on the rows that each device has."""

    def local(qkv, qk_norm):
        return attend(qkv, num_heads=num_heads, qk_norm=qk_norm, eps=eps)

    mesh = jax.sharding.get_abstract_mesh()
    axes = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if t == AxisType.Explicit}  # fmt: skip
    if not axes:
        return local(qkv, qk_norm)
    rows = P(*_spec(qkv))
    weights = None if qk_norm is None else P()
    return jax.shard_map(
        local,
        in_specs=(rows, weights),
        out_specs=rows,
        axis_names=axes,
        check_vma=False,  # a Pallas call does not say over which axes its results vary
    )(qkv, qk_norm)


def _composed(qkv, num_heads, qk_norm, eps, mask, implementation):
    parts = list(jnp.split(qkv, 3, axis=-1))
    chosen = implementation or choose(*_heads(parts, num_heads), mask)
    whole = isinstance(mask, Full) and _spread(qkv) is None  # rows, which see all of themselves
    loops = platform() == "tpu" and not is_plain()
    if chosen == "xla" and loops and whole and qkv_xla.supports(qkv, num_heads):
        return _on_each_device(qkv_xla.attention, qkv, num_heads, qk_norm, eps)
    if qk_norm is not None:
        parts[:2] = (_rms_norm(x, w, eps) for x, w in zip(parts[:2], qk_norm, strict=True))
    mixed = attention(*_heads(parts, num_heads), mask=mask, implementation=chosen)
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    return jnp.reshape(mixed, shape, out_sharding=spec("batch", None, None))


def _heads(parts, num_heads):
    """Each [B, T, H·D] → [B, T, H, D]."""
    shape = (*parts[0].shape[:2], num_heads, parts[0].shape[2] // num_heads)
    heads = spec("batch", None, None, None)
    return [jnp.reshape(part, shape, out_sharding=heads) for part in parts]


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The operations of `models.layers.RMSNorm`, one for one."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.astype(x.dtype)
