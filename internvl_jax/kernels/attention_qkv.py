"""Attention on a fused projection's own output, QK-normalisation included."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from internvl_jax.kernels import qkv_tpu
from internvl_jax.kernels.attention import attention
from internvl_jax.kernels.masks import Full, Mask
from internvl_jax.sharding import spec

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
    if implementation in (None, "pallas_tpu"):
        reason = _refusal(qkv, num_heads, mask)
        if implementation == "pallas_tpu" and reason is not None:
            raise ValueError(f"attention implementation 'pallas_tpu' cannot run: {reason}")
        # The kernel itself runs anywhere, but only a TPU compiles it.
        if implementation == "pallas_tpu" or (reason is None and _platform() == "tpu"):
            return _kernel(qkv, num_heads, qk_norm, eps)
    return _composed(qkv, num_heads, qk_norm, eps, mask, implementation)


def _refusal(qkv: jax.Array, num_heads: int, mask: Mask) -> str | None:
    if not isinstance(mask, Full):
        return f"the kernel has no mask {type(mask).__name__}"
    reason = qkv_tpu.supports(qkv, num_heads)
    if reason is None and _platform() == "tpu":
        wanted, there = qkv_tpu.memory(qkv), pltpu.get_tpu_info().vmem_capacity_bytes
        if wanted > there:
            reason = (
                f"{qkv.shape[1]} tokens of {qkv.shape[2]} columns want {wanted >> 20} MiB of the "
                f"core's memory, which has {there >> 20}"
            )
    return reason


def _platform() -> str:
    """Of the current mesh's devices, which may exist for the compiler only."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _kernel(qkv, num_heads, qk_norm, eps):
    run = functools.partial(
        qkv_tpu.attention, num_heads=num_heads, eps=eps, interpret=_platform() != "tpu"
    )
    if jax.sharding.get_abstract_mesh().empty:
        return run(qkv, qk_norm=qk_norm)
    rows = spec("batch", None, None)
    weights = None if qk_norm is None else P()
    local = jax.shard_map(
        lambda qkv, qk_norm: run(qkv, qk_norm=qk_norm),
        in_specs=(rows, weights),
        out_specs=rows,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )
    return local(qkv, qk_norm)


def _composed(qkv, num_heads, qk_norm, eps, mask, implementation):
    parts = list(jnp.split(qkv, 3, axis=-1))
    if qk_norm is not None:
        parts[:2] = (_rms_norm(x, w, eps) for x, w in zip(parts[:2], qk_norm, strict=True))
    shape = (*qkv.shape[:2], num_heads, parts[0].shape[-1] // num_heads)
    heads = spec("batch", None, None, None)
    parts = [jnp.reshape(part, shape, out_sharding=heads) for part in parts]
    mixed = attention(*parts, mask=mask, implementation=implementation)
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    return jnp.reshape(mixed, shape, out_sharding=spec("batch", None, None))


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """The operations of `models.layers.RMSNorm`, one for one."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.astype(x.dtype)
