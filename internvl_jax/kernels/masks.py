"""Attention masks as small values: what may be seen is computed, never stored per head.

QLLaMA runs sequences of Q query tokens followed by text. Its modes (q = queries, t = text):

        Full (ITM)          Separate (ITC)      Prefix (ITG)        Causal
            q   t               q   t               q   t
        q   ■   ■           q   ■   ·           q   ■   ·           ◣ over everything
        t   ■   ■           t   ·   ◣           t   ■   ◣

Masks combine with `&`: `Causal() & Keys(ids > 0)`.

A mask is a pytree whose arrays lie along the batch (`ROW`, [B]), the keys (`KEY`, [B, S]) or the
queries (`QUERY`, [B, T]). One formula, `sees`, serves everywhere: XLA gives it whole arrays, a
kernel a mask rebuilt (`replace`) from the scalars and vectors of its tile. `some` applies it to
whole tiles, whose positions and values are known by their least and greatest, so that a kernel
can pass over what nothing sees; `never` tells what it need not even pass over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ITM, ITC, ITG = 0, 1, 2  # row modes of `Middleware`
ROW, KEY, QUERY = "row", "key", "query"  # what an array of a mask lies along
EVERY = 2**30  # beyond any position


class Span(NamedTuple):
    """The least and the greatest of a tile's positions or values."""

    low: Any
    high: Any


class Mask:
    """What a query position may see; combine two with `&`."""

    along: tuple[str, ...] = ()  # of each array, in the order of `jax.tree.leaves`

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """Whether positions `query` see positions `key`; all shapes broadcast."""
        raise TypeError(f"{type(self).__name__} does not say what is visible")

    def some(self, query: Span, key: Span) -> Any:
        """Whether some pair of a tile may be visible; the mask's arrays are scalars or spans."""
        return True

    def never(self, query: Span, key: Span) -> bool:
        """Whether no pair of a tile is visible whatever the mask's arrays hold."""
        with jax.ensure_compile_time_eval():
            return not self.along and not self.some(query, key)

    def replace(self, arrays: Sequence[Any]) -> "Mask":
        """The same mask with other arrays in the order of `along`."""
        return jax.tree.unflatten(jax.tree.structure(self), arrays)

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        """Boolean array broadcastable to [B, T, S]."""
        axes = {ROW: (1, 2), KEY: (1,), QUERY: (2,)}
        arrays = zip(jax.tree.leaves(self), self.along, strict=True)
        spread = self.replace([jnp.expand_dims(a, axes[along]) for a, along in arrays])
        query = jnp.arange(num_queries)[None, :, None]
        return spread.sees(query, jnp.arange(num_keys)[None, None, :])

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Full(Mask):
    """Everything sees everything."""

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return key >= 0


class Interval(Mask):
    """Masks by which each query sees one run of keys, whose two ends never move back."""

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        """First and last key position that each query sees."""
        raise TypeError(f"{type(self).__name__} does not say which keys are seen")

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        first, last = self.keys(query)
        upper = key <= last
        return upper if isinstance(first, int) and first == 0 else upper & (key >= first)

    def some(self, query: Span, key: Span) -> Any:
        (first, _), (_, last) = self.keys(query.low), self.keys(query.high)
        return (key.high >= first) & (key.low <= last)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Interval):
    """Position t sees positions 0…t."""

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        return 0, query


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lengths(Interval):
    """Only the first `count` keys of each row are seen, by every query."""

    count: jax.Array  # int32 [B]
    along = (ROW,)

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        return 0, self.count - 1


@dataclass(frozen=True)
class Prefix(Interval):
    """The first `size` positions see one another; later ones see all before them (ITG)."""

    size: int

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        return 0, jnp.maximum(query, self.size - 1)


@dataclass(frozen=True)
class Separate(Interval):
    """The first `size` positions see one another; later ones causally see only later ones (ITC)."""

    size: int

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        return jnp.where(query < self.size, 0, self.size), jnp.maximum(query, self.size - 1)


jax.tree_util.register_dataclass(Prefix, data_fields=[], meta_fields=["size"])
jax.tree_util.register_dataclass(Separate, data_fields=[], meta_fields=["size"])


@dataclass(frozen=True)
class Middleware(Interval):
    """A mode per row, so that one pass of QLLaMA serves several objectives.

    `mode` is int32 [B]: ITM rows are `Full`, ITC rows `Separate`, ITG rows `Prefix`.
    """

    size: int
    mode: jax.Array
    along = (ROW,)

    def keys(self, query: jax.Array) -> tuple[Any, Any]:
        text = jnp.where(self.mode == ITC, self.size, 0)
        least = jnp.where(self.mode == ITM, EVERY, self.size - 1)
        return jnp.where(query < self.size, 0, text), jnp.maximum(query, least)


jax.tree_util.register_dataclass(Middleware, data_fields=["mode"], meta_fields=["size"])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys(Mask):
    """Only keys marked valid are seen, by every query."""

    valid: jax.Array  # bool [B, S]
    along = (KEY,)

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.valid != 0

    def some(self, query: Span, key: Span) -> Any:
        return self.valid.high != 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments(Mask):
    """Packed sequences: a query sees the keys whose segment number is its own."""

    query: jax.Array  # int32 [B, T]
    key: jax.Array  # int32 [B, S]
    along = (QUERY, KEY)

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.query == self.key

    def some(self, query: Span, key: Span) -> Any:
        return (self.query.low <= self.key.high) & (self.key.low <= self.query.high)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """Visible under both masks."""

    first: Mask
    second: Mask

    @property
    def along(self) -> tuple[str, ...]:
        return self.first.along + self.second.along

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        return self.first.sees(query, key) & self.second.sees(query, key)

    def some(self, query: Span, key: Span) -> Any:
        return self.first.some(query, key) & self.second.some(query, key)

    def never(self, query: Span, key: Span) -> bool:
        return self.first.never(query, key) or self.second.never(query, key)
