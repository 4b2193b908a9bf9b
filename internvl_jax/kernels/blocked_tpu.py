"""Attention in blocks with an online softmax, for sequences of any length: a Pallas TPU kernel.

The forward is FlashAttention's (arXiv 2205.14135, 2307.08691), the backward one kernel of five
products per tile instead of the usual two of seven: it keeps a head's query gradient in VMEM.

Scores are computed transposed, keys down and queries across. Then the softmax runs down the
vector registers without crossing lanes; a query's maximum, sum and log-sum-exp are single rows
that broadcast for free and leave the kernel in the layout in which the backward reads them.

Heads of 128 are read as lane slices of [B, T, H·D], so nothing is transposed or padded in HBM.
The last block may hang over an end; what it reads there is replaced by zeros.

The grid holds only tiles in which something could be visible: of a causal mask, half of them. What
the values of a mask hide beyond that (padding, segments) is passed over as the kernel comes to it.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from internvl_jax.kernels import vmem
from internvl_jax.kernels.masks import KEY, QUERY, ROW, Full, Mask, Span

LOG2_E = 1.4426950408889634
HIDDEN = -2e30  # score of a pair that the mask hides
FLOOR = -1e30  # least running maximum: above HIDDEN, so that a hidden pair weighs nothing
BLOCK = 1024  # positions per block: of 512, the backward's sums in VMEM are read too often
SMALL_BLOCK = 512  # where VMEM is small, as on v4


@dataclass(frozen=True)
class Sizes:
    """What is known when a kernel is built; `interpret` runs it without a TPU."""

    queries: int
    keys: int
    heads: int
    key_heads: int
    dim: int
    block_q: int
    block_k: int
    scale: float
    interpret: bool | pltpu.InterpretParams

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def q_blocks(self) -> int:
        return pl.cdiv(self.queries, self.block_q)

    @property
    def k_blocks(self) -> int:
        return pl.cdiv(self.keys, self.block_k)


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """None, or why this kernel cannot run."""
    dim, dtypes = query.shape[3], {a.dtype for a in (query, key, value)}
    if dim not in (64, 128):
        return f"the blocked kernel takes a head_dim of 64 or 128, not {dim}"
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"the blocked kernel takes bfloat16 or float32 throughout, not {dtypes}"
    lengths = query.shape[1], key.shape[1]
    # A head's gradients, summed in float32 and twice on their way out; a tile's scores and theirs.
    kept = 128 * (4 + 2 * query.dtype.itemsize) * (lengths[0] + 2 * lengths[1])
    tile = 8 * _block(lengths[0]) * _block(lengths[1])
    if kept + tile > 0.9 * vmem.available():
        return f"a backward over {lengths[0]} × {lengths[1]} positions outgrows VMEM"
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask,
    scale: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    _, queries, heads, dim = query.shape
    keys, key_heads = key.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    blocks = _block(queries), _block(keys)
    sizes = Sizes(queries, keys, heads, key_heads, dim, *blocks, scale, interpret)
    # Booleans have no place in a kernel's memory; numbers do.
    mask = jax.tree.map(lambda a: a.astype(jnp.int32), mask)
    return _attend(sizes, query, key, value, mask)


def _block(length: int) -> int:
    """Block of at most `BLOCK` positions that leaves little hanging over the end."""
    most = BLOCK if vmem.available() >= 64 * vmem.MEGABYTE else SMALL_BLOCK
    if length <= most:
        return length
    even = pl.cdiv(length, pl.cdiv(length, most))
    return pl.cdiv(even, 128) * 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes, query, key, value, mask):
    return _forward(sizes, query, key, value, mask)[0]


def _attend_forward(sizes, query, key, value, mask):
    kept = _forward(sizes, query, key, value, mask)
    mixed, lse = (checkpoint_name(a, "attention") for a in kept)
    return mixed, (query, key, value, mask, mixed, lse)


def _attend_backward(sizes, saved, gradient):
    query, key, value, mask, mixed, lse = saved
    delta = jnp.einsum(
        "bthd,bthd->bht", gradient, mixed, preferred_element_type=jnp.float32
    )[:, :, None]
    return *_backward(sizes, query, key, value, mask, gradient, lse, delta), None


_attend.defvjp(_attend_forward, _attend_backward)


# What a kernel sees of a mask.


def _mask_inputs(sizes: Sizes, mask: Mask) -> tuple[list, list]:
    """Scalars for SMEM (rows, and the least and greatest of each block), and vectors for VMEM."""
    scalars, vectors = [], []
    for array, along in zip(jax.tree.leaves(mask), mask.along, strict=True):
        if along == ROW:
            scalars.append(array)
            continue
        blocks = sizes.q_blocks if along == QUERY else sizes.k_blocks
        size = sizes.block_q if along == QUERY else sizes.block_k
        over = blocks * size - array.shape[1]
        split = jnp.pad(array, ((0, 0), (0, over)), mode="edge").reshape(-1, blocks, size)
        scalars += [split.min(-1), split.max(-1)]
        vectors.append(array[:, None])
    return scalars, vectors


def _mask_specs(sizes: Sizes, mask: Mask, q_at, k_at) -> list[pl.BlockSpec]:
    specs = []
    for along in mask.along:
        if along == QUERY:
            specs.append(pl.BlockSpec(
                (None, 1, sizes.block_q), lambda b, *g: (b, 0, q_at(b, *g))))  # fmt: skip
        elif along == KEY:
            specs.append(pl.BlockSpec(
                (None, 1, sizes.block_k), lambda b, *g: (b, 0, k_at(b, *g))))  # fmt: skip
    return specs


def _some(sizes: Sizes, mask: Mask, scalars, b, i, j):
    """Whether some pair of tile i, j of row b may be visible."""
    refs, arrays = iter(scalars), []
    for along in mask.along:
        if along == ROW:
            arrays.append(next(refs)[b])
        else:
            at = i if along == QUERY else j
            arrays.append(Span(next(refs)[b, at], next(refs)[b, at]))
    return mask.replace(arrays).some(*_positions(sizes, i, j))


def _positions(sizes: Sizes, i, j) -> tuple[Span, Span]:
    """Queries and keys of tile i, j."""
    return (
        Span(i * sizes.block_q, (i + 1) * sizes.block_q - 1),
        Span(j * sizes.block_k, (j + 1) * sizes.block_k - 1),
    )


def _tiles(sizes: Sizes, mask: Mask) -> list[tuple[int, int]]:
    """The tiles (i, j) to go through, i by i; at least one of each i, which has to be written."""
    found = []
    for i in range(sizes.q_blocks):
        some = [j for j in range(sizes.k_blocks) if not mask.never(*_positions(sizes, i, j))]
        found += [(i, j) for j in some or [0]]
    return found


def _when_some(some, run) -> None:
    run() if some is True else pl.when(some)(run)


def _hide(sizes: Sizes, mask: Mask, scalars, vectors, b, i, j, scores):
    """Scores [block_k, block_q] with HIDDEN where the mask hides, or beyond the last key."""
    if isinstance(mask, Full) and sizes.keys % sizes.block_k == 0:
        return scores
    query = i * sizes.block_q + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.block_q), 1)
    key = j * sizes.block_k + jax.lax.broadcasted_iota(jnp.int32, (sizes.block_k, 1), 0)
    refs, values, arrays = iter(scalars), iter(vectors), []
    for along in mask.along:
        if along == ROW:
            arrays.append(next(refs)[b])
            continue
        next(refs), next(refs)
        row = next(values)[...]
        arrays.append(row if along == QUERY else _column(row))
    visible = mask.replace(arrays).sees(query, key)
    if sizes.keys % sizes.block_k:
        visible = visible & (key < sizes.keys)
    return jnp.where(visible, scores, HIDDEN)


def _column(row):
    """[1, n] → [n, 1]."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


# Products.


def _dot(a, b, dims):
    # Said outright: what JAX is set to by default may be more than products of bfloat16 can be.
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _rows(ref, block, size, length):
    """A block [size, D]; rows beyond the array's end are zeros."""
    x = ref[...]
    if length % size == 0:
        return x
    at = block * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return jnp.where(at < length, x, jnp.zeros_like(x))


def _lanes(ref, block, size, length):
    """The same for a row [1, size]."""
    x = ref[...]
    if length % size == 0:
        return x
    at = block * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    return jnp.where(at < length, x, 0.0)


# Layout.


def _to_hbm(x, sizes: Sizes):
    """[B, T, H, D] → [B, T, H·D] where a head is whole lanes, else [B, H, T, D]."""
    return x.reshape(*x.shape[:2], -1) if sizes.dim % 128 == 0 else x.swapaxes(1, 2)


def _from_hbm(x, sizes: Sizes):
    if sizes.dim % 128 == 0:
        return x.reshape(*x.shape[:2], -1, sizes.dim)
    return x.swapaxes(1, 2)


def _hbm_shape(batch, length, heads, sizes: Sizes, dtype):
    dim = sizes.dim
    wide = dim % 128 == 0
    return jax.ShapeDtypeStruct(
        (batch, length, heads * dim) if wide else (batch, heads, length, dim), dtype
    )


def _spec(sizes: Sizes, size: int, head, at) -> pl.BlockSpec:
    """`size` positions of one head; `head` and `at` map the grid to head and block."""
    if sizes.dim % 128 == 0:
        return pl.BlockSpec((None, size, sizes.dim), lambda b, *g: (b, at(b, *g), head(b, *g)))
    return pl.BlockSpec(
        (None, None, size, sizes.dim), lambda b, *g: (b, head(b, *g), at(b, *g), 0)
    )


# Forward: grid (row, head, tile), the tiles query block by query block.


def _forward_kernel(sizes: Sizes, mask: Mask, *refs):
    q_of, k_of, *refs = refs
    scalars, vectors, rest = _split(mask, refs)
    q_ref, k_ref, v_ref, o_ref, lse_ref, m_ref, l_ref, acc_ref = rest
    b, n, count = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    i, j = q_of[n], k_of[n]

    @pl.when((n == 0) | (q_of[jnp.maximum(n - 1, 0)] != i))
    def start():
        m_ref[...] = jnp.full_like(m_ref, FLOOR)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def tile():
        k = _rows(k_ref, j, sizes.block_k, sizes.keys)
        v = _rows(v_ref, j, sizes.block_k, sizes.keys)
        scores = _dot(k, q_ref[...], ((1,), (1,))) * (sizes.scale * LOG2_E)  # [block_k, block_q]
        scores = _hide(sizes, mask, scalars, vectors, b, i, j, scores)
        last = m_ref[...]
        most = jnp.maximum(last, scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - most)
        keep = jnp.exp2(last - most)
        m_ref[...] = most
        l_ref[...] = l_ref[...] * keep + weights.sum(axis=0, keepdims=True)
        mixed = _dot(v, weights.astype(v.dtype), ((0,), (0,)))  # [D, block_q]
        acc_ref[...] = acc_ref[...] * keep + mixed

    _when_some(_some(sizes, mask, scalars, b, i, j), tile)

    @pl.when((n == count - 1) | (q_of[jnp.minimum(n + 1, count - 1)] != i))
    def finish():
        total = l_ref[...]
        seen = total > 0
        divisor = jnp.where(seen, total, 1.0)
        o_ref[...] = (acc_ref[...] / divisor).T.astype(o_ref.dtype)
        lse_ref[...] = jnp.where(seen, m_ref[...] + jnp.log2(divisor), 0.0)


def _split(mask: Mask, refs) -> Iterator:
    rows = sum(along == ROW for along in mask.along)
    others = len(mask.along) - rows
    scalars = rows + 2 * others
    return refs[:scalars], refs[scalars : scalars + others], refs[scalars + others :]


def _forward(sizes: Sizes, query, key, value, mask):
    batch = query.shape[0]
    tiles = np.array(_tiles(sizes, mask), np.int32).T
    scalars, vectors = _mask_inputs(sizes, mask)

    def q_at(b, h, n, q_of, *_):
        return q_of[n]

    def k_at(b, h, n, q_of, k_of, *scalars):
        some = _some(sizes, mask, scalars, b, q_of[n], k_of[n])
        # What nothing sees is not read: the first block stands in, which the next step needs.
        return k_of[n] if some is True else jnp.where(some, k_of[n], 0)

    def head(b, h, *_):
        return h

    def key_head(b, h, *_):
        return h // sizes.group

    q_spec = _spec(sizes, sizes.block_q, head, q_at)
    k_spec = _spec(sizes, sizes.block_k, key_head, k_at)
    row = pl.BlockSpec((None, None, 1, sizes.block_q), lambda b, h, *g: (b, h, 0, q_at(b, h, *g)))
    mixed, lse = pl.pallas_call(
        functools.partial(_forward_kernel, sizes, mask),
        out_shape=(
            _hbm_shape(batch, sizes.queries, sizes.heads, sizes, value.dtype),
            jax.ShapeDtypeStruct((batch, sizes.heads, 1, sizes.queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(scalars),
            grid=(batch, sizes.heads, tiles.shape[1]),
            in_specs=[*_mask_specs(sizes, mask, q_at, k_at), q_spec, k_spec, k_spec],
            out_specs=(q_spec, row),
            scratch_shapes=[
                pltpu.VMEM((1, sizes.block_q), jnp.float32),
                pltpu.VMEM((1, sizes.block_q), jnp.float32),
                pltpu.VMEM((sizes.dim, sizes.block_q), jnp.float32),
            ],
        ),
        compiler_params=_params(2, 1),
        interpret=sizes.interpret,
        name="attention_blocked",
    )(*tiles, *scalars, *vectors, *(_to_hbm(x, sizes) for x in (query, key, value)))
    return _from_hbm(mixed, sizes), lse


def _params(parallel: int, arbitrary: int) -> pltpu.CompilerParams:
    kinds = ("parallel",) * parallel + ("arbitrary",) * arbitrary
    most = vmem.available() * 15 // 16
    return pltpu.CompilerParams(dimension_semantics=kinds, vmem_limit_bytes=most)


# Backward: grid (row, key head, query head of its group, tile), the tiles key block by key block.


def _backward_kernel(sizes: Sizes, mask: Mask, *refs):
    q_of, k_of, *refs = refs
    scalars, vectors, rest = _split(mask, refs)
    q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref, *sums = rest
    dq_sum, dk_sum, dv_sum = sums
    b, r, n = (pl.program_id(axis) for axis in (0, 2, 3))
    i, j = q_of[n], k_of[n]
    first, last = n == 0, n == pl.num_programs(3) - 1

    @pl.when(first)
    def start_head():
        dq_sum[...] = jnp.zeros_like(dq_sum)

    @pl.when(first & (r == 0))
    def start_group():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def tile():
        k = _rows(k_ref, j, sizes.block_k, sizes.keys)
        v = _rows(v_ref, j, sizes.block_k, sizes.keys)
        q = _rows(q_ref, i, sizes.block_q, sizes.queries)
        g = _rows(g_ref, i, sizes.block_q, sizes.queries)
        lse = _lanes(lse_ref, i, sizes.block_q, sizes.queries)
        delta = _lanes(delta_ref, i, sizes.block_q, sizes.queries)
        scores = _dot(k, q, ((1,), (1,))) * (sizes.scale * LOG2_E)  # [block_k, block_q]
        scores = _hide(sizes, mask, scalars, vectors, b, i, j, scores)
        weights = jnp.exp2(scores - lse)
        to_weights = _dot(v, g, ((1,), (1,)))
        to_scores = (weights * (to_weights - delta)).astype(q.dtype)
        k_rows = pl.ds(pl.multiple_of(j * sizes.block_k, sizes.block_k), sizes.block_k)
        q_rows = pl.ds(pl.multiple_of(i * sizes.block_q, sizes.block_q), sizes.block_q)
        dv_sum[k_rows, :] += _dot(weights.astype(g.dtype), g, ((1,), (0,)))
        dk_sum[k_rows, :] += _dot(to_scores, q, ((1,), (0,)))
        dq_sum[q_rows, :] += _dot(to_scores, k, ((0,), (0,)))

    _when_some(_some(sizes, mask, scalars, b, i, j), tile)

    @pl.when(last)
    def finish_head():
        dq_ref[...] = (dq_sum[: sizes.queries] * sizes.scale).astype(dq_ref.dtype)

    @pl.when(last & (r == sizes.group - 1))
    def finish_group():
        dk_ref[...] = (dk_sum[: sizes.keys] * sizes.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[: sizes.keys].astype(dv_ref.dtype)


def _backward(sizes: Sizes, query, key, value, mask, gradient, lse, delta):
    batch = query.shape[0]
    in_order = sorted(_tiles(sizes, mask), key=lambda tile: (tile[1], tile[0]))
    tiles = np.array(in_order, np.int32).T
    scalars, vectors = _mask_inputs(sizes, mask)

    def q_at(b, h, r, n, q_of, k_of, *scalars):
        some = _some(sizes, mask, scalars, b, q_of[n], k_of[n])
        # Of the blocks that nothing needs, the last stands in: it is the one read before them.
        return q_of[n] if some is True else jnp.where(some, q_of[n], sizes.q_blocks - 1)

    def k_at(b, h, r, n, q_of, k_of, *_):
        return k_of[n]

    def head(b, h, r, *_):
        return h * sizes.group + r

    def key_head(b, h, *_):
        return h

    def whole(*_):
        return 0

    q_spec = _spec(sizes, sizes.block_q, head, q_at)
    k_spec = _spec(sizes, sizes.block_k, key_head, k_at)
    row = pl.BlockSpec(
        (None, None, 1, sizes.block_q), lambda b, *g: (b, head(b, *g), 0, q_at(b, *g))
    )
    over_q, over_k = sizes.q_blocks * sizes.block_q, sizes.k_blocks * sizes.block_k
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, sizes, mask),
        out_shape=(
            _hbm_shape(batch, sizes.queries, sizes.heads, sizes, query.dtype),
            _hbm_shape(batch, sizes.keys, sizes.key_heads, sizes, key.dtype),
            _hbm_shape(batch, sizes.keys, sizes.key_heads, sizes, value.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(scalars),
            grid=(batch, sizes.key_heads, sizes.group, tiles.shape[1]),
            in_specs=[
                *_mask_specs(sizes, mask, q_at, k_at), q_spec, k_spec, k_spec, q_spec, row, row
            ],
            out_specs=(
                _spec(sizes, sizes.queries, head, whole),
                _spec(sizes, sizes.keys, key_head, whole),
                _spec(sizes, sizes.keys, key_head, whole),
            ),
            scratch_shapes=[
                pltpu.VMEM((over, sizes.dim), jnp.float32) for over in (over_q, over_k, over_k)
            ],
        ),
        compiler_params=_params(2, 2),
        interpret=sizes.interpret,
        name="attention_blocked_backward",
    )(
        *tiles,
        *scalars,
        *vectors,
        *(_to_hbm(x, sizes) for x in (query, key, value, gradient)),
        lse,
        delta,
    )
    return tuple(_from_hbm(x, sizes) for x in gradients)
