"""Attention on a projection's own output by plain XLA operations on a TPU, one head at a time.

Asked for all heads at once, the TPU compiler copies queries, keys and values from `[B, T, H·D]`
into heads and the results back, and writes scores to HBM. Columns of a head are whole tiles of 128
lanes where D is a multiple of 128: in a loop over heads each product reads them where they lie and
writes its result into its place, and the scores of one head stay in vector memory.

The gradient is written out, since that of a loop would keep what each turn computed. It keeps the
log-sum-exp of each row and head, and the inverse root mean squares of QK-normalisation.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LANES = 128
Settings = tuple[int, float]  # heads, eps


def supports(qkv: jax.Array, num_heads: int) -> bool:
    """Whether the columns of a head are whole tiles."""
    return qkv.shape[-1] % (3 * num_heads * LANES) == 0


def attention(
    qkv: jax.Array,
    *,
    num_heads: int,
    qk_norm: tuple[jax.Array, jax.Array] | None,
    eps: float,
) -> jax.Array:
    """Unmasked attention, [B, T, 3·H·D] → [B, T, H·D]; see `kernels.attention_qkv`."""
    return _attend((num_heads, eps), qkv, qk_norm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, qkv: jax.Array, weights: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    return _forward(settings, qkv, weights)[0]


def _save(settings, qkv, weights):
    kept = _forward(settings, qkv, weights)
    out, log_sums, inverse = jax.tree.map(lambda a: checkpoint_name(a, "attention"), kept)
    return out, (qkv, weights, log_sums, inverse)


def _forward(settings, qkv, weights):
    """Mixed values, log-sum-exps float32 [H, B, T], inverse RMS of queries and keys [B, T, 1]."""
    heads, eps = settings
    batch, length, wide = qkv.shape
    inverse = None if weights is None else tuple(_inverse_rms(qkv, i, eps) for i in range(2))
    ones = jnp.ones((length, LANES), qkv.dtype)

    def attend(head, results):
        out, log_sums = results
        query, key, value = _head(qkv, head, heads, inverse, weights)  # [B, T, D]
        scores = _scores(query, key)  # [B, T, T]
        most = jnp.max(scores, axis=-1, keepdims=True)
        shares = jnp.exp(scores - most).astype(qkv.dtype)
        # By a product: a sum of its own would take the exponentials a second time.
        total = _product("bts,sd->btd", shares, ones)[..., :1]
        mixed = _product("bts,bsd->btd", shares, value) / total
        log_sum = most + jnp.log(total)
        return (
            _put(out, mixed, head),
            jax.lax.dynamic_update_index_in_dim(log_sums, log_sum[..., 0], head, 0),
        )

    # Filled by the loop: zeros would cost a pass over the whole.
    out = jax.lax.empty((batch, length, wide // 3), qkv.dtype)
    log_sums = jax.lax.empty((heads, batch, length), jnp.float32)
    return *jax.lax.fori_loop(0, heads, attend, (out, log_sums)), inverse


def _backward(settings, saved, gradient):
    heads, _ = settings
    qkv, weights, log_sums, inverse = saved
    batch, length, wide = qkv.shape
    scale = (wide // (3 * heads)) ** -0.5

    def attend(head, results):
        dqkv, norms = results
        query, key, value = _head(qkv, head, heads, inverse, weights)  # [B, T, D]
        pull = _columns(gradient, head, heads)
        shares = jnp.exp(_scores(query, key) - log_sums[head][..., None])  # [B, T, T]
        to_shares = _product("btd,bsd->bts", pull, value)
        mean = jnp.sum(shares * to_shares, axis=-1, keepdims=True)
        to_scores = (shares * (to_shares - mean) * scale).astype(qkv.dtype)
        dquery = _product("bts,bsd->btd", to_scores, key).astype(qkv.dtype)
        dkey = _product("bts,btd->bsd", to_scores, query).astype(qkv.dtype)
        dvalue = _product("bts,btd->bsd", shares.astype(qkv.dtype), pull)
        if weights is not None:
            norms = tuple(
                _add_norm(sums, dx, _columns(qkv, i * heads + head, 3 * heads), r, w, head, heads)
                for i, (sums, dx, r, w) in enumerate(
                    zip(norms, (dquery, dkey), inverse, weights, strict=True)
                )
            )
        for i, dx in enumerate((dquery, dkey, dvalue)):
            dqkv = _put(dqkv, dx, i * heads + head)
        return dqkv, norms

    empty = jax.lax.empty(qkv.shape, qkv.dtype)
    if weights is None:
        return jax.lax.fori_loop(0, heads, attend, (empty, None))[0], None
    zeros = jnp.zeros((batch, length, 1)), jnp.zeros((wide // 3,))
    dqkv, norms = jax.lax.fori_loop(0, heads, attend, (empty, (zeros, zeros)))
    # Through the norm's mean, which is over all heads.
    for i, ((along, _), r, w) in enumerate(zip(norms, inverse, weights, strict=True)):
        dx, x = (_columns(a, i, 3).astype(jnp.float32) for a in (dqkv, qkv))
        dx = r * (dx * _wide(w, qkv.dtype) - x * r * along / x.shape[-1])
        dqkv = _put(dqkv, dx, i)
    return dqkv, tuple(dw.astype(w.dtype) for (_, dw), w in zip(norms, weights, strict=True))


_attend.defvjp(_save, _backward)


def _add_norm(sums, dx, x, inverse, weight, head, heads):
    """What a head adds to the norm's sums: of dx · weight · unit over columns [B, T, 1], and, in
    the head's columns, of dx · unit over rows [H·D]."""
    along, dweight = sums
    product = dx.astype(jnp.float32) * (x.astype(jnp.float32) * inverse)
    own = _wide(_columns(weight, head, heads), x.dtype)
    along += jnp.sum(product * own, axis=-1, keepdims=True)
    return along, _put(dweight, jnp.sum(product, axis=(0, 1)), head)


def _head(qkv, head, heads, inverse, weights):
    """Queries, keys and values of a head, [B, T, D], normalised as `models.layers.RMSNorm` does."""
    parts = [_columns(qkv, i * heads + head, 3 * heads) for i in range(3)]
    if weights is not None:
        for i, (r, w) in enumerate(zip(inverse, weights, strict=True)):
            unit = (parts[i].astype(jnp.float32) * r).astype(qkv.dtype)
            parts[i] = unit * _columns(w, head, heads).astype(qkv.dtype)
    return parts


def _inverse_rms(qkv: jax.Array, third: int, eps: float) -> jax.Array:
    """rsqrt(mean(x²) + eps) over all queries' or keys' columns, float32 [B, T, 1]."""
    x = jnp.split(qkv, 3, axis=-1)[third].astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def _scores(query, key):
    return _product("btd,bsd->bts", query, key) * query.shape[-1] ** -0.5


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _wide(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 of what a weight is in the dtype in which it multiplies."""
    return weight.astype(dtype).astype(jnp.float32)


def _columns(x: jax.Array, index: jax.Array | int, parts: int) -> jax.Array:
    """The columns of one part of so many."""
    width = x.shape[-1] // parts
    return jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=x.ndim - 1)


def _put(x: jax.Array, part: jax.Array, index: jax.Array | int) -> jax.Array:
    """`x` with a part of its columns replaced."""
    start = index * part.shape[-1]
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, axis=x.ndim - 1)
