"""Attention in ten lines: the truth that every implementation is tested against."""

import jax
import jax.numpy as jnp

from internvl_jax.kernels.masks import Mask


def probabilities(
    query: jax.Array, key: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Attention probabilities [B, H, T, S]; rows that see no key are all zero.

    Computed in float32, or in float64 for float64 inputs.

    Args:
        query: [B, T, H, D].
        key: [B, S, K, D] where K divides H (grouped queries: head h reads key head h // (H/K)).
        mask: what each query sees.
        scale: multiplies the scores; 1/sqrt(D) by default.
    """
    batch, length, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], dim)
    exact = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=exact)
    visible = mask.visible(length, key.shape[1])[:, None, None]
    scores = jnp.where(visible, scores * scale, jnp.finfo(exact).min)
    weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0.0)
    return weights.reshape(batch, heads, length, key.shape[1])


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """Runs everywhere."""
    return None


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; softmax in float32 (or float64), result in the
    value's dtype."""
    exact = jnp.promote_types(value.dtype, jnp.float32)
    weights = probabilities(query, key, mask=mask, scale=scale).astype(value.dtype)
    batch, heads, length, keys = weights.shape
    groups = value.shape[2]
    weights = weights.reshape(batch, groups, heads // groups, length, keys)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value, preferred_element_type=exact)
    return mixed.reshape(batch, length, heads, value.shape[-1]).astype(value.dtype)
