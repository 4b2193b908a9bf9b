"""Attention through plain XLA operations: `jax.nn.dot_product_attention` with a computed mask."""

import jax
import jax.numpy as jnp

from internvl_jax.kernels.masks import Full, Mask


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """Runs everywhere."""
    return None


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    if isinstance(mask, Full):
        return jax.nn.dot_product_attention(query, key, value, scale=scale)
    visible = mask.visible(query.shape[1], key.shape[1])
    mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], scale=scale)
    # The library spreads a row that sees nothing evenly over all keys; here it gives zeros.
    sees = jnp.any(visible, axis=-1)[:, :, None, None]
    return jnp.where(sees, mixed, jnp.zeros_like(mixed))
