"""Attention through plain XLA operations: `jax.nn.dot_product_attention` with a computed mask."""

import jax
import jax.numpy as jnp

from internvl_jax.kernels.masks import Full, Mask
from internvl_jax.sharding import platform

CACHED_BYTES = 4 * 2**20  # of scores that a CPU computes at once; they should stay in its cache


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """Runs everywhere."""
    return None


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: Mask, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    if isinstance(mask, Full):
        parts = _parts(query, key)
        if parts > 1:
            return _in_parts(query, key, value, scale, parts)
        return jax.nn.dot_product_attention(query, key, value, scale=scale)
    visible = mask.visible(query.shape[1], key.shape[1])
    mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[:, None], scale=scale)
    # The library spreads a row that sees nothing evenly over all keys; here it gives zeros.
    sees = jnp.any(visible, axis=-1)[:, :, None, None]
    return jnp.where(sees, mixed, jnp.zeros_like(mixed))


def _parts(query: jax.Array, key: jax.Array) -> int:
    """How many parts of the batch to compute one after the other; 1 but for one CPU device."""
    batch, queries, heads, _ = query.shape
    alone = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    if not alone or heads != key.shape[2]:
        return 1
    most = max(1, CACHED_BYTES // (4 * heads * queries * key.shape[1]))
    return next(n for n in range(1, batch + 1) if batch % n == 0 and batch <= most * n)


def _in_parts(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None, parts: int
) -> jax.Array:
    """Unmasked attention of a few examples at a time, heads first.

    A CPU's products are twice as fast on [B, H, T, D]. Scores are not kept for the backward pass:
    where they outgrow the cache, computing them again costs less than writing and reading them.
    """

    @jax.checkpoint
    def attend(part):
        query, key, value = (x.transpose(0, 2, 1, 3) for x in part)
        scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * scale, axis=-1).astype(value.dtype)
        return jnp.einsum("bhts,bhsd->bhtd", weights, value).transpose(0, 2, 1, 3)

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    split = [x.reshape(parts, -1, *x.shape[1:]) for x in (query, key, value)]
    return jax.lax.map(attend, split).reshape(query.shape)
