"""Attention through plain XLA operations, arranged for speed.

The softmax is normalised after the product with the values, so that the division runs over
[T, D] and not over [T, S], and a fully masked `Full` costs nothing.
"""

import jax
import jax.numpy as jnp

from internvl_jax.kernels.masks import Full, Mask


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    batch, length, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    grouped = (query * scale).reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=jnp.float32)
    if not isinstance(mask, Full):
        visible = mask.visible(length, key.shape[1])[:, None, None]
        scores = jnp.where(visible, scores, -jnp.inf)
    # A row that sees nothing has maximum -inf; 0 in its place makes every weight exp(-inf) = 0.
    peak = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1)  # [B, K, G, T]
    mixed = jnp.einsum(
        "bkgts,bskd->btkgd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    total = jnp.where(total == 0.0, 1.0, total).transpose(0, 3, 1, 2)[..., None]
    return (mixed / total).reshape(batch, length, heads, value.shape[-1]).astype(value.dtype)
