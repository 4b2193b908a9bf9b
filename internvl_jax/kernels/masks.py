"""Attention masks as small values: what may be seen is computed, never stored per head.

    mask.visible(T, S) → bool, broadcastable to [B, T, S]; True where query t may see key s.

QLLaMA runs sequences of Q query tokens followed by text. Its modes (q = queries, t = text):

        Full (ITM)          Separate (ITC)      Prefix (ITG)        Causal
            q   t               q   t               q   t
        q   ■   ■           q   ■   ·           q   ■   ·           ◣ over everything
        t   ■   ■           t   ·   ◣           t   ■   ◣

Masks combine with `&`: `Causal() & Keys(ids > 0)`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

ITM, ITC, ITG = 0, 1, 2  # row modes of `Middleware`


class Mask:
    """What a query position may see; combine two with `&`."""

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        """Boolean array broadcastable to [B, T, S]."""
        raise TypeError(f"{type(self).__name__} does not say what is visible")

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)


def _positions(num_queries: int, num_keys: int) -> tuple[jax.Array, jax.Array]:
    """Query and key positions as [1, T, 1] and [1, 1, S]."""
    return jnp.arange(num_queries)[None, :, None], jnp.arange(num_keys)[None, None, :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Full(Mask):
    """Everything sees everything."""

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        return jnp.ones((1, 1, num_keys), bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """Position t sees positions 0…t."""

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        query, key = _positions(num_queries, num_keys)
        return key <= query


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Keys(Mask):
    """Only keys marked valid are seen, by every query."""

    valid: jax.Array  # bool [B, S]

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        return self.valid[:, None, :]


@dataclass(frozen=True)
class Prefix(Mask):
    """The first `size` positions see one another; later ones see all before them (ITG)."""

    size: int

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        query, key = _positions(num_queries, num_keys)
        return (key <= query) | ((query < self.size) & (key < self.size))


@dataclass(frozen=True)
class Separate(Mask):
    """The first `size` positions see one another; later ones causally see only later ones (ITC)."""

    size: int

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        query, key = _positions(num_queries, num_keys)
        in_prefix = (query < self.size) & (key < self.size)
        in_text = (query >= self.size) & (key >= self.size) & (key <= query)
        return in_prefix | in_text


jax.tree_util.register_dataclass(Prefix, data_fields=[], meta_fields=["size"])
jax.tree_util.register_dataclass(Separate, data_fields=[], meta_fields=["size"])


@dataclass(frozen=True)
class Middleware(Mask):
    """A mode per row, so that one pass of QLLaMA serves several objectives.

    `mode` is int32 [B]: ITM rows are `Full`, ITC rows `Separate`, ITG rows `Prefix`.
    """

    size: int
    mode: jax.Array

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        mode = self.mode[:, None, None]
        separate = Separate(self.size).visible(num_queries, num_keys)
        prefix = Prefix(self.size).visible(num_queries, num_keys)
        return (mode == ITM) | ((mode == ITC) & separate) | ((mode == ITG) & prefix)


jax.tree_util.register_dataclass(Middleware, data_fields=["mode"], meta_fields=["size"])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """Visible under both masks."""

    first: Mask
    second: Mask

    def visible(self, num_queries: int, num_keys: int) -> jax.Array:
        first = self.first.visible(num_queries, num_keys)
        return first & self.second.visible(num_queries, num_keys)
