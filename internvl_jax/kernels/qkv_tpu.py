"""InternViT's attention as one Pallas TPU kernel each way, on the projection's own output.

A grid step holds the rows of one image: queries, keys and values of all heads lie beside one
another in `[T, 3·H·D]`, and a head is a slice of D = 128 lanes. Nothing is padded, transposed or
reshaped in HBM on either side, and the scores never leave VMEM. QK-normalisation over the full
width H·D happens inside, where the rows already are.

InternViT's lengths are one more than a multiple of 128 (256 patches and the class token). The
matrix unit works in tiles of 128 keys, so the last key (forward) or query (backward) would cost it
a whole tile: where one row is left over, the vector unit handles it.

The forward pass keeps the log-sum-exp of each row and head, in base 2, and in two more lanes the
inverse root mean squares of the row's queries and keys. The backward pass works on transposed
scores, keys down and queries across: of its five products only that of the query's gradient then
has an operand to transpose, and per-query numbers are rows, spread over the keys for free.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from internvl_jax.kernels import pipeline_tpu
from internvl_jax.kernels.products_tpu import COLUMNS_BY_ROWS, PLAIN, ROWS_BY_ROWS, dot

LANES = 128
LONGEST = 385
MOST_HEADS = LANES - 2  # a lane each, and two for the statistics of QK-normalisation
MEGABYTE = 2**20


def supports(qkv: jax.Array, num_heads: int) -> str | None:
    """Why these kernels cannot take such an array; None where they can."""
    length, wide = qkv.shape[1:]
    if wide % (3 * num_heads):
        return f"{wide} columns are not queries, keys and values of {num_heads} heads"
    if wide // (3 * num_heads) != LANES:
        return f"a head has {wide // (3 * num_heads)} columns, the kernel takes {LANES}"
    if num_heads > MOST_HEADS:
        return f"{num_heads} heads; the kernel takes at most {MOST_HEADS}"
    if length > LONGEST:
        return f"{length} tokens; the kernel takes at most {LONGEST}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the dtype is {qkv.dtype}, not bfloat16 or float32"
    return None


def attention(
    qkv: jax.Array,
    *,
    num_heads: int,
    qk_norm: tuple[jax.Array, jax.Array] | None,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """Unmasked attention, [B, T, 3·H·D] → [B, T, H·D]; see `kernels.attention_qkv`."""
    settings = (num_heads, eps, interpret)
    if qk_norm is None:
        return _attend(settings, qkv, None)
    weights = jnp.stack([w.astype(qkv.dtype) for w in qk_norm])
    return _attend(settings, qkv, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: tuple, qkv: jax.Array, weights: jax.Array | None) -> jax.Array:
    return _forward(settings, qkv, weights)[0]


def _save(settings, qkv, weights):
    kept = _forward(settings, qkv, weights)
    out, log_sum = (checkpoint_name(a, "attention") for a in kept)
    return out, (qkv, weights, log_sum)


def _forward(settings, qkv, weights):
    heads, eps, interpret = settings
    batch, length, wide = qkv.shape
    padded = pl.cdiv(length, LANES) * LANES
    kernel = functools.partial(
        _forward_kernel, heads=heads, eps=eps, normalised=weights is not None
    )
    return pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[_rows(length, wide), *_weight_specs(weights, wide)],
        out_specs=[_rows(length, wide // 3), _rows(padded, LANES)],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, wide // 3), qkv.dtype),
            jax.ShapeDtypeStruct((batch, padded, LANES), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((3, length, LANES), qkv.dtype),
            pltpu.VMEM((3, length, LANES), qkv.dtype),
            pltpu.VMEM((3, length, _main(length)), jnp.float32),
        ],
        compiler_params=_parameters(qkv, thirds=4),
        name="attention_qkv_forward",
        interpret=interpret,
    )(qkv, *(() if weights is None else (weights,)))


def _backward(settings, saved, gradient):
    heads, eps, interpret = settings
    qkv, weights, log_sum = saved
    batch, length, wide = qkv.shape
    normalised = weights is not None
    padded = log_sum.shape[1]
    kernel = functools.partial(_backward_kernel, heads=heads, eps=eps, normalised=normalised)
    weight_gradients = [(1, 2, wide // 3)] if normalised else []
    out = pl.pallas_call(
        kernel,
        grid=(batch,),
        in_specs=[
            _rows(length, wide),
            _rows(length, wide // 3),
            _rows(padded, LANES),
            *_weight_specs(weights, wide),
        ],
        out_specs=[
            _rows(length, wide),
            *(pl.BlockSpec(shape, lambda b: (b, 0, 0)) for shape in weight_gradients),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            *(
                jax.ShapeDtypeStruct((batch, *shape[1:]), jnp.float32)
                for shape in weight_gradients
            ),
        ],
        scratch_shapes=[
            pltpu.VMEM((LANES, padded), jnp.float32),
            *[pltpu.VMEM((4, length, LANES), qkv.dtype)] * 2,
            *[pltpu.VMEM((4, length, _main(length)), jnp.float32)] * 2,
            *[pltpu.VMEM((4, length, _main(length)), qkv.dtype)] * 2,
            *([pltpu.VMEM((2, 4, length, LANES), qkv.dtype)] if normalised else []),
            *([pltpu.VMEM((2, length, LANES), jnp.float32)] * 2 if normalised else []),
        ],
        compiler_params=_parameters(qkv, thirds=7),
        name="attention_qkv_backward",
        interpret=interpret,
    )(qkv, gradient, log_sum, *(() if weights is None else (weights,)))
    if not normalised:
        return out[0], None
    return out[0], jnp.sum(out[1], axis=0).astype(weights.dtype)


_attend.defvjp(_save, _backward)


def _rows(length: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, length, width), lambda b: (b, 0, 0))


def _weight_specs(weights: jax.Array | None, wide: int) -> list[pl.BlockSpec]:
    return [] if weights is None else [pl.BlockSpec((2, wide // 3), lambda b: (0, 0))]


def memory(qkv: jax.Array, thirds: int = 7) -> int:
    """Bytes of VMEM for the blocks of a step and of the next, and for the heads in the pipeline.

    thirds: of the size of an image's qkv that all blocks together have; backward by default.
    """
    length, wide = qkv.shape[1:]
    rows = pl.cdiv(length, 16) * 16
    blocks = 2 * rows * wide * qkv.dtype.itemsize * thirds // 3
    pipeline = 4 * rows * (4 * (rows + LANES) + 4 * LANES) * 4
    return blocks + pipeline + 2 * MEGABYTE


def _parameters(qkv: jax.Array, thirds: int) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",), vmem_limit_bytes=memory(qkv, thirds)
    )


def _main(length: int) -> int:
    """Rows for the matrix unit: all, or all but a last one that would take a tile of its own."""
    return length - 1 if length > 1 and length % LANES == 1 else length


def _lanes(head: jax.Array | int, first: int = 0):
    """The columns of a head, `first` heads into the array."""
    return pl.ds(pl.multiple_of((head + first) * LANES, LANES), LANES)


def _inverse_rms(qkv_ref, first: int, heads: int, eps: float) -> jax.Array:
    """rsqrt(mean(x²) + eps) over the H·D columns from head `first` on, float32 [T, 1]."""
    squares = 0.0
    for head in range(heads):
        x = qkv_ref[0, :, _lanes(head, first)].astype(jnp.float32)
        squares += x * x
    mean = jnp.sum(squares, axis=1, keepdims=True) / (heads * LANES)
    return jax.lax.rsqrt(mean + eps)


def _forward_kernel(qkv_ref, *refs, heads, eps, normalised):
    weight_ref = refs[0] if normalised else None
    out_ref, log_sum_ref, query_ref, key_ref, scores_ref = refs[-5:]
    length = qkv_ref.shape[1]
    main = _main(length)
    inverse = (
        [_inverse_rms(qkv_ref, part * heads, heads, eps) for part in range(2)]
        if normalised
        else None
    )
    to_base_2 = LANES**-0.5 * math.log2(math.e)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    if normalised:
        of_query, of_key = inverse
        kept = jnp.where(lane == MOST_HEADS, of_query, of_key)
        log_sum_ref[0, :length, :] = jnp.where(lane < MOST_HEADS, 0.0, kept)

    def normalise(head, slot):
        for part, ref in enumerate((query_ref, key_ref)):
            ref[slot] = _normalised(qkv_ref, weight_ref, inverse, part, head, heads)[1]

    def score(head, slot):
        scores_ref[slot] = dot(query_ref[slot], key_ref[slot, :main], ROWS_BY_ROWS)  # [T, S]

    def mix(head, slot):
        scores = scores_ref[slot]
        top = jnp.max(scores, axis=1, keepdims=True)
        if main < length:
            last = _row_products(query_ref[slot], key_ref[slot, main:])
            top = jnp.maximum(top, last)
        weights = jnp.exp2((scores - top) * to_base_2)
        total = jnp.sum(weights, axis=1, keepdims=True)
        value = qkv_ref[0, :, _lanes(head, 2 * heads)]
        mixed = dot(weights.astype(value.dtype), value[:main], PLAIN)
        if main < length:
            weight = jnp.exp2((last - top) * to_base_2)
            total += weight
            mixed += weight * value[main:].astype(jnp.float32)
        out_ref[0, :, _lanes(head)] = (mixed / total).astype(out_ref.dtype)
        log_sum_ref[0, :length, :] = jnp.where(
            lane == head, top * to_base_2 + jnp.log2(total), log_sum_ref[0, :length, :]
        )

    pipeline_tpu.run((normalise, score, mix), heads)


def _row_products(rows: jax.Array, row: jax.Array) -> jax.Array:
    """[T, D] · [1, D] → float32 [T, 1] on the vector unit."""
    product = rows.astype(jnp.float32) * row.astype(jnp.float32)
    return jnp.sum(product, axis=1, keepdims=True)


def _normalised(qkv_ref, weight_ref, inverse, part: int, head, heads: int):
    """Queries (part 0) or keys (1) of a head, [T, D]: without and with the norm's weight.

    Rounded as `models.layers.RMSNorm` rounds: after the statistics, and after the weight.
    """
    x = qkv_ref[0, :, _lanes(head, part * heads)]
    if weight_ref is None:
        return x, x
    unit = (x.astype(jnp.float32) * inverse[part]).astype(x.dtype)
    weight = weight_ref[part : part + 1, _lanes(head)].astype(jnp.float32)
    return unit, (unit.astype(jnp.float32) * weight).astype(x.dtype)


def _backward_kernel(qkv_ref, gradient_ref, log_sum_ref, *refs, heads, eps, normalised):
    weight_ref = refs[0] if normalised else None
    out_ref, *refs = refs[1:] if normalised else refs
    weight_gradient_ref = refs.pop(0) if normalised else None
    log_sums_ref, query_ref, key_ref, scores_ref, pull_ref, weights_ref, push_ref, *refs = refs
    unit_ref, radial_ref, inverse_ref = refs if normalised else (None, None, None)
    length = qkv_ref.shape[1]
    if normalised:
        radial_ref[...] = jnp.zeros_like(radial_ref)
        for part in range(2):  # spread over the lanes once, not for every head
            kept = log_sum_ref[0, :length, MOST_HEADS + part : MOST_HEADS + part + 1]
            inverse_ref[part] = jnp.broadcast_to(kept, (length, LANES))
    main = _main(length)
    scale = LANES**-0.5
    to_base_2 = scale * math.log2(math.e)
    log_sums_ref[...] = log_sum_ref[0].T  # a row per head

    def value_and_gradient(head):
        return qkv_ref[0, :, _lanes(head, 2 * heads)], gradient_ref[0, :, _lanes(head)]

    def normalise(head, slot):
        for part, ref in enumerate((query_ref, key_ref)):
            unit, ref[slot] = _normalised(qkv_ref, weight_ref, inverse_ref, part, head, heads)
            if normalised:
                unit_ref[part, slot] = unit

    def score(head, slot):
        value, gradient = value_and_gradient(head)
        scores_ref[slot] = dot(key_ref[slot], query_ref[slot, :main], ROWS_BY_ROWS)  # [S, T]
        pull_ref[slot] = dot(value, gradient[:main], ROWS_BY_ROWS)

    def soften(head, slot):
        log_sum = log_sums_ref[pl.ds(head, 1), :]
        weights = jnp.exp2(scores_ref[slot] * to_base_2 - log_sum[:, :main])
        pull = pull_ref[slot]
        mean = jnp.sum(weights * pull, axis=0, keepdims=True)
        weights_ref[slot] = weights.astype(weights_ref.dtype)
        push_ref[slot] = (weights * (pull - mean)).astype(push_ref.dtype)

    def pull_back(head, slot):
        # One gradient after the other, so that few values are held at a time.
        query, key, push = query_ref[slot], key_ref[slot], push_ref[slot]
        value, gradient = value_and_gradient(head)
        if main < length:
            log_sum = log_sums_ref[pl.ds(head, 1), :]
            last_query, last_gradient = (a[main:].astype(jnp.float32) for a in (query, gradient))
            last_weights = jnp.exp2(
                _row_products(key, last_query) * to_base_2 - log_sum[:, main : main + 1]
            )
            pull = _row_products(value, last_gradient)
            mean = jnp.sum(last_weights * pull, axis=0, keepdims=True)
            last_push = last_weights * (pull - mean)
        value_gradient = dot(weights_ref[slot], gradient[:main], PLAIN)
        if main < length:
            value_gradient += last_weights * last_gradient
        out_ref[0, :, _lanes(head, 2 * heads)] = value_gradient.astype(out_ref.dtype)
        key_gradient = dot(push, query[:main], PLAIN)
        if main < length:
            key_gradient += last_push * last_query
        through_norm(head, slot, 1, [(slice(0, length), key_gradient)])
        query_gradient = [(slice(0, main), dot(push, key, COLUMNS_BY_ROWS))]
        if main < length:
            last = jnp.sum(last_push * key.astype(jnp.float32), axis=0, keepdims=True)
            query_gradient.append((slice(main, length), last))
        through_norm(head, slot, 0, query_gradient)

    def through_norm(head, slot, part, pieces):
        """Gradients of the normalised queries or keys of a head, up to the mean over the width."""
        weight_gradient = 0.0
        for rows, piece in pieces:
            piece = (piece * scale).astype(out_ref.dtype)
            if normalised:
                piece = piece.astype(jnp.float32)
                unit = unit_ref[part, slot, rows].astype(jnp.float32)
                weight = weight_ref[part : part + 1, _lanes(head)].astype(jnp.float32)
                along = piece * unit
                weight_gradient += jnp.sum(along, axis=0, keepdims=True)
                radial_ref[part, rows] += along * weight
                piece = (piece * weight).astype(out_ref.dtype)
            out_ref[0, rows, _lanes(head, part * heads)] = piece
        if normalised:
            weight_gradient_ref[0, part : part + 1, _lanes(head)] = weight_gradient

    pipeline_tpu.run((normalise, score, soften, pull_back), heads)
    if not normalised:
        return
    # So many heads side by side, for the compiler to interleave.
    together = max(n for n in range(1, 6) if heads % n == 0)
    for part in range(2):
        radial = jnp.sum(radial_ref[part], axis=1, keepdims=True) / (heads * LANES)
        inverse = inverse_ref[part]
        away = inverse * inverse * radial

        @pl.loop(0, heads // together)
        def _(turn, part=part, inverse=inverse, away=away):
            for head in range(together):
                columns = _lanes(turn * together + head, part * heads)
                x = qkv_ref[0, :, columns].astype(jnp.float32)
                wide = out_ref[0, :, columns].astype(jnp.float32)
                out_ref[0, :, columns] = (wide * inverse - x * away).astype(out_ref.dtype)
