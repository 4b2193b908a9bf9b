"""The bodies of the short attention kernels, forward and backward; `short_tpu` calls them.

Scores are computed transposed, keys down and queries across, a tile of queries at a time: softmax
then runs down the vector registers without crossing lanes, a query's statistics are single rows
that broadcast for free, and the backward has one operand to transpose in five products. As every
key is there, no maximum is ever corrected.

What the mask hides is worked out once per sequence, from the mask's small arrays, into a bias that
all heads share. Masked or not, a query that sees nothing gets zeros and gives no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from internvl_jax.kernels import pipeline_tpu, vmem
from internvl_jax.kernels.masks import QUERY, ROW, Mask
from internvl_jax.kernels.products_tpu import COLUMNS_BY_ROWS, PLAIN, ROWS_BY_ROWS, dot

LANES = 128
UNTILED = 384  # queries that are handled at once; more of them come in tiles
TILES = (384, 256, 128)  # of these sizes, the largest of those that leave least hanging over
CHUNK = 64  # keys that the vector unit handles at once
HIDDEN = -2e30  # added to the score of a pair that the mask hides
FLOOR = -1e30  # least maximum: above HIDDEN, so that a hidden pair weighs nothing
STAGES = 3


@dataclass(frozen=True)
class Sizes:
    """What is known when a kernel is built; `interpret` runs it without a TPU."""

    queries: int
    keys: int
    heads: int
    key_heads: int
    group: int  # key heads in a grid step
    masked: bool
    scale: float
    interpret: bool | pltpu.InterpretParams

    @property
    def repeat(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def tile(self) -> int:
        if self.queries <= UNTILED:
            return self.queries
        return min(TILES, key=lambda tile: _whole(self.queries, tile))

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.queries, self.tile)

    @property
    def rows(self) -> int:
        """Queries of whole tiles; those beyond the last one are read as zeros."""
        return self.tiles * self.tile

    def memory(self, itemsize: int) -> int:
        """Bytes of VMEM of the backward: blocks of this step and the next, pipeline, sums, bias."""
        keys, rows = _whole(self.keys, 16), _whole(self.rows, 16)
        tile = _whole(self.tile, LANES)
        heads = self.group * self.repeat
        blocks = 2 * LANES * itemsize * (3 * rows * heads + 4 * keys * self.group)
        log_sums = 2 * 8 * heads * _whole(self.rows, LANES) * 4
        pipeline = STAGES * keys * tile * 2 * (4 + itemsize)
        sums = 2 * keys * LANES * 4
        bias = keys * _whole(self.rows, LANES) * 4 if self.masked else 0
        return blocks + log_sums + pipeline + sums + bias + keys * tile * 4 + 2 * vmem.MEGABYTE


def packed(sizes: Sizes, dtype):
    """Scratch for an operand [S, T] of the matrix unit, in columns of 128.

    A register holds 16 rows of bfloat16 and memory 8 in a row of tiles: only where a row is one
    tile are they adjacent, so that one load fills a register.
    """
    return pltpu.VMEM((STAGES, pl.cdiv(sizes.tile, LANES), sizes.keys, LANES), dtype)


def _pack(ref, slot: int, keys: slice, x: jax.Array) -> None:
    for i in range(ref.shape[1]):
        part = x[:, i * LANES : (i + 1) * LANES]
        ref[slot, i, keys, : part.shape[1]] = part.astype(ref.dtype)


def _unpack(sizes: Sizes, ref, slot: int) -> jax.Array:
    """[S, T]"""
    last = sizes.tile - (ref.shape[1] - 1) * LANES
    parts = [ref[slot, i] for i in range(ref.shape[1] - 1)]
    return jnp.concatenate([*parts, ref[slot, ref.shape[1] - 1, :, :last]], axis=1)


def summed(sizes: Sizes) -> bool:
    """Whether several tiles contribute to the gradients of a key head."""
    return sizes.repeat * sizes.tiles > 1


class _Item:
    """Where the tile of a head lies in the blocks of a grid step."""

    def __init__(self, sizes: Sizes, item: jax.Array | int):
        self.head, self.tile = _divmod(item, sizes.tiles)
        start = self.tile * sizes.tile
        self.rows = pl.ds(pl.multiple_of(start, sizes.tile), sizes.tile)
        if sizes.tiles == 1:
            self.rows = slice(None)
        self.lanes = _lanes(self.head)
        shared, sharer = _divmod(self.head, sizes.repeat)
        self.key_lanes = _lanes(shared)
        # Whether it is the first to contribute to its key head.
        self.first = (self.tile == 0) & (sharer == 0)
        self.left = sizes.queries - start  # queries that there are from here on


def _divmod(number: jax.Array | int, by: int) -> tuple[jax.Array | int, jax.Array | int]:
    """Of numbers that are not negative, which spares the scalar unit their signs."""
    if by == 1 or isinstance(number, int):
        return divmod(number, by) if by > 1 else (number, 0)
    return jax.lax.div(number, by), jax.lax.rem(number, by)


def _chunks(sizes: Sizes) -> list[slice]:
    """Keys of which all numbers for a tile of queries fit the vector registers."""
    return [slice(i, min(i + CHUNK, sizes.keys)) for i in range(0, sizes.keys, CHUNK)]


def _lanes(head):
    return pl.ds(pl.multiple_of(head * LANES, LANES), LANES)


def _tile(sizes: Sizes, ref, item: _Item) -> jax.Array:
    """Queries of a tile, [tile, D]; those beyond the last one are zeros."""
    x = ref[item.rows, item.lanes]
    if sizes.rows == sizes.queries:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, (sizes.tile, 1), 0)
    return jnp.where(row < item.left, x, jnp.zeros_like(x))


def _column(row: jax.Array) -> jax.Array:
    """[8, n], all rows the same → [n, 1]."""
    return row.T[:, :1]


def _hide(sizes: Sizes, mask: Mask, scalars, vectors, bias_ref) -> None:
    """Write what is added to the scores [S, T] of every head: nothing, or HIDDEN."""
    b, key = pl.program_id(0), jax.lax.broadcasted_iota(jnp.int32, (sizes.keys, 1), 0)

    @pl.when(pl.program_id(1) == 0)
    def _():
        @pl.loop(0, sizes.tiles)
        def _(tile):
            start = pl.multiple_of(tile * sizes.tile, sizes.tile)
            columns = pl.ds(start, sizes.tile) if sizes.tiles > 1 else slice(None)
            query = start + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.tile), 1)
            rows, values, arrays = iter(scalars), iter(vectors), []
            for along in mask.along:
                if along == ROW:
                    arrays.append(next(rows)[b])
                elif along == QUERY:
                    arrays.append(next(values)[:, columns])
                else:
                    row = next(values)[...]
                    arrays.append(_column(jnp.broadcast_to(row, (8, row.shape[1]))))
            visible = mask.replace(arrays).sees(query, key)
            bias_ref[:, columns] = jnp.where(
                jnp.broadcast_to(visible, (sizes.keys, sizes.tile)), 0.0, HIDDEN
            )


def _seen(sizes: Sizes, mask: Mask, scalars, vectors, scores_ref, bias_ref=None) -> Callable:
    """Reads scores of a slot, in base 2 and with the mask's bias, once this has been written."""
    to_base_2 = sizes.scale * math.log2(math.e)
    if bias_ref is not None:
        _hide(sizes, mask, scalars, vectors, bias_ref)

    def seen(item: _Item, slot: int, keys: slice) -> jax.Array:
        scores = scores_ref[slot, keys] * to_base_2
        return scores if bias_ref is None else scores + bias_ref[keys, item.rows]

    return seen


def _split(mask: Mask, refs) -> tuple:
    """A kernel's arguments: scalars and vectors of the mask, then the others."""
    rows, all_ = sum(along == ROW for along in mask.along), len(mask.along)
    return refs[:rows], refs[rows:all_], refs[all_:]


def forward_kernel(sizes: Sizes, mask: Mask, *refs):
    scalars, vectors, refs = _split(mask, refs)
    query_ref, key_ref, value_ref, out_ref, log_sum_ref, scores_ref, weights_ref, total_ref = (
        refs[:8]
    )
    seen = _seen(sizes, mask, scalars, vectors, scores_ref, *refs[8:])

    def score(index, slot):
        item = _Item(sizes, index)
        query = _tile(sizes, query_ref, item)
        scores_ref[slot] = dot(key_ref[:, item.key_lanes], query, ROWS_BY_ROWS)  # [S, T]

    def soften(index, slot):
        item = _Item(sizes, index)
        top = jnp.full((1, sizes.tile), FLOOR)
        for keys in _chunks(sizes):
            top = jnp.maximum(top, jnp.max(seen(item, slot, keys), axis=0, keepdims=True))
        total = jnp.zeros((1, sizes.tile))
        for keys in _chunks(sizes):
            weights = jnp.exp2(seen(item, slot, keys) - top)
            total += jnp.sum(weights, axis=0, keepdims=True)
            _pack(weights_ref, slot, keys, weights)
        if sizes.masked:
            total = jnp.where(total > 0, total, 1.0)
        total_ref[slot] = jnp.broadcast_to(1 / total, total_ref.shape[1:])
        log_sum_ref[item.head, :, item.rows] = top + jnp.log2(total)

    def mix(index, slot):
        item = _Item(sizes, index)
        weights = _unpack(sizes, weights_ref, slot)
        mixed = dot(weights, value_ref[:, item.key_lanes], COLUMNS_BY_ROWS)
        out_ref[item.rows, item.lanes] = (mixed * _column(total_ref[slot])).astype(out_ref.dtype)

    pipeline_tpu.run((score, soften, mix), sizes.group * sizes.repeat * sizes.tiles)


def backward_kernel(sizes: Sizes, mask: Mask, *refs):
    scalars, vectors, refs = _split(mask, refs)
    query_ref, key_ref, value_ref, gradient_ref, log_sum_ref, *refs = refs
    to_query_ref, to_key_ref, to_value_ref, *refs = refs
    scores_ref, pull_ref, weights_ref, push_ref, *refs = refs
    summed_ref = refs.pop(0) if summed(sizes) else None
    seen = _seen(sizes, mask, scalars, vectors, scores_ref, *refs)

    def score(index, slot):
        item = _Item(sizes, index)
        query, gradient = (_tile(sizes, ref, item) for ref in (query_ref, gradient_ref))
        scores_ref[slot] = dot(key_ref[:, item.key_lanes], query, ROWS_BY_ROWS)  # [S, T]
        pull_ref[slot] = dot(value_ref[:, item.key_lanes], gradient, ROWS_BY_ROWS)

    def soften(index, slot):
        item = _Item(sizes, index)
        log_sum = log_sum_ref[item.head, :, item.rows]
        mean = jnp.zeros((1, sizes.tile))
        for keys in _chunks(sizes):
            weights = jnp.exp2(seen(item, slot, keys) - log_sum)
            mean += jnp.sum(weights * pull_ref[slot, keys], axis=0, keepdims=True)
            _pack(weights_ref, slot, keys, weights)
            scores_ref[slot, keys] = weights
        for keys in _chunks(sizes):
            push = scores_ref[slot, keys] * (pull_ref[slot, keys] - mean)
            _pack(push_ref, slot, keys, push)

    def pull_back(index, slot):
        item = _Item(sizes, index)
        query, gradient = (_tile(sizes, ref, item) for ref in (query_ref, gradient_ref))
        push = _unpack(sizes, push_ref, slot)
        to_keys = (
            (to_value_ref, _unpack(sizes, weights_ref, slot), gradient, 1.0),
            (to_key_ref, push, query, sizes.scale),
        )
        for part, (ref, weights, rows, scale) in enumerate(to_keys):
            piece = dot(weights, rows, PLAIN)
            if summed(sizes):
                piece += jnp.where(item.first, 0.0, summed_ref[part])
                summed_ref[part] = piece
            ref[:, item.key_lanes] = (piece * scale).astype(ref.dtype)
        to_query = dot(push, key_ref[:, item.key_lanes], COLUMNS_BY_ROWS)
        to_query_ref[item.rows, item.lanes] = (to_query * sizes.scale).astype(to_query_ref.dtype)

    pipeline_tpu.run((score, soften, pull_back), sizes.group * sizes.repeat * sizes.tiles)


def _whole(count: int, of: int) -> int:
    return pl.cdiv(count, of) * of
