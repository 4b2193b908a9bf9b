"""Attention on NVIDIA GPUs by cuDNN's fused kernels, through JAX."""

import jax
import jax.numpy as jnp

from internvl_jax.kernels.masks import Both, Causal, Full, Lengths, Mask
from internvl_jax.sharding import platform


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """None, or why cuDNN cannot run."""
    if platform() not in ("gpu", "cuda"):
        return f"cuDNN needs an NVIDIA GPU, this is {platform()}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 and float16, not {query.dtype}"
    if query.shape[3] > 128 or query.shape[3] % 8:
        return f"cuDNN takes a head_dim of up to 128 in steps of 8, not {query.shape[3]}"
    if _terms(mask) is None:
        return f"{type(mask).__name__} would be written out as [B, H, T, S] for cuDNN"
    return None


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    causal, counts = _terms(mask)
    lengths = None
    if counts is not None:
        # cuDNN gives no zeros for a row without keys: it reads one, and is overwritten below.
        full = jnp.full(query.shape[:1], query.shape[1], jnp.int32)
        lengths = (full, jnp.maximum(counts, 1))
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=None if lengths is None else lengths[0],
        key_value_seq_lengths=None if lengths is None else lengths[1],
        implementation="cudnn",
    )
    if counts is None:
        return mixed
    return jnp.where((counts > 0)[:, None, None, None], mixed, jnp.zeros_like(mixed))


def _terms(mask: Mask) -> tuple[bool, jax.Array | None] | None:
    """(causal, key counts [B]) for the masks that cuDNN computes itself; None for the others."""
    if isinstance(mask, Full):
        return False, None
    if isinstance(mask, Causal):
        return True, None
    if isinstance(mask, Lengths):
        return False, mask.count.astype(jnp.int32)
    if isinstance(mask, Both):
        first, second = _terms(mask.first), _terms(mask.second)
        if first is not None and second is not None:
            counts = [c for c in (first[1], second[1]) if c is not None]
            fewest = None if not counts else counts[0]
            for count in counts[1:]:
                fewest = jnp.minimum(fewest, count)
            return first[0] or second[0], fewest
    return None
