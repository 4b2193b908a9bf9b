"""LLaMA: the text tower of stage 1, the trunk of QLLaMA, and the chat decoder.

One scanned stack serves all three; `qllama.py` adds the cross-attention. Generation keeps a fixed
size key/value cache: `prefill` fills it, `decode` advances every row by one token.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.kernels import Keys, Mask
from internvl_jax.models import rope
from internvl_jax.models.attention import LlamaAttention
from internvl_jax.models.config import LlamaConfig
from internvl_jax.models.int8 import Int8
from internvl_jax.models.layers import Embed, Linear, RMSNorm, SwiGlu, remat, stack
from internvl_jax.models.product import product
from internvl_jax.models.rope import Tables
from internvl_jax.sharding import laid_positions, positions_axis, reshard, spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, for generation.

    Attributes:
        keys, values: [L, B, S, K, D]; slots from `length` on are not yet written.
        visible: bool [B, S]; written slots that hold a real token.
        positions: int32 [B]; rotary position of the next token of each row.
        length: int32 scalar; slots written so far, the same for every row.
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array
    positions: jax.Array
    length: jax.Array

    def take(self, rows: jax.Array) -> "Cache":
        """The cache with its batch rows picked or repeated by index (beam search)."""
        return Cache(
            keys=_take(self.keys, rows, axis=1),
            values=_take(self.values, rows, axis=1),
            visible=_take(self.visible, rows, axis=0),
            positions=_take(self.positions, rows, axis=0),
            length=self.length,
        )


def _take(array: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    """Rows of an array along its batch axis, sharded as it was."""
    meshless = jax.sharding.get_abstract_mesh().empty
    out = None if meshless else jax.typeof(array).sharding.spec
    return array.at[(slice(None),) * axis + (rows,)].get(out_sharding=out)


class Block(nnx.Module):
    """x + attention(norm1 x), then x + mlp(norm2 x)."""

    def __init__(self, config: LlamaConfig, key: jax.Array):
        first, second = jax.random.split(key)
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attn = LlamaAttention(config, first)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.mlp = SwiGlu(config.width, config.mlp_dim, second)

    def self_attention(
        self, x: jax.Array, mask: Mask, tables: Tables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Residual self-attention; also the keys and values it used."""
        with jax.named_scope("attention"):
            query, key, value = self.attn.project(self.norm1(x), tables)
            update = self.attn.attend(query, key, value, mask, laid_positions(x))
            return x + update, key, value

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Residual MLP."""
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))

    def decode(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, slot: jax.Array, mask: Mask,
        tables: Tables,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One new token per row against cached keys and values [B, S, K, D], written at `slot`."""
        query, key, value = self.attn.project(self.norm1(x), tables)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), slot, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(
            values, value.astype(values.dtype), slot, axis=1
        )
        x = x + self.attn.attend(query, keys, values, mask)
        return self.feed_forward(x), keys, values


class Llama(nnx.Module):
    """Embedding, scanned blocks, final RMSNorm and (optionally) the language head."""

    def __init__(self, config: LlamaConfig, key: jax.Array, *, language_head: bool = True):
        embed, blocks, head = jax.random.split(key, 3)
        self.config = config
        self.embed = Embed(config.vocab_size, config.width, embed)
        self.blocks = stack(lambda k: Block(config, k), config.depth, blocks)
        self.norm = RMSNorm(config.width, config.eps)
        separate = language_head and not config.tie_embeddings
        self.lm_head = (
            Linear(config.width, config.vocab_size, head, axes=("embed", None))
            if separate
            else None
        )

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, T] → [B, T, W] in the activation dtype; ids below 0 embed as id 0."""
        return self.embed(jnp.maximum(tokens, 0), self.config.dtype)

    def tables(self, positions: jax.Array) -> Tables:
        """Rotary tables for positions [B, T]."""
        config = self.config
        return rope.tables(positions, config.head_dim, config.rope_base, config.rope_scaling)

    def head_kernel(self) -> jax.Array | Int8:
        """The language head [W, V]: its own kernel or the transposed embedding table."""
        if self.lm_head is not None:
            return self.lm_head.kernel[...]
        if not self.config.tie_embeddings:
            raise ValueError("this LLaMA has no language head (an InternVL-C text tower)")
        return self.embed.embedding[...].T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final-norm hidden states [B, T, W] → float32 [B, T, V]."""
        kernel = self.head_kernel()
        if isinstance(kernel, Int8):
            return product(hidden, kernel, ("embed", None)).astype(jnp.float32)
        kernel = kernel.astype(hidden.dtype)
        out = spec("batch", laid_positions(hidden), None)
        return jnp.einsum("btd,dv->btv", hidden, kernel, out_sharding=out).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        hidden_states: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Embeddings [B, T, W] → final-norm hidden states [B, T, W].

        With `hidden_states` also [L + 1, B, T, W]: the embeddings, each block's output except the
        last, and last the final-norm states.
        """
        hidden, _, _, states = self.run(x, mask=mask, positions=positions, states=hidden_states)
        return (hidden, states) if hidden_states else hidden

    def run(
        self,
        x: jax.Array,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        states: bool = False,
        cache: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
        """Hidden states, and if asked for, stacked keys and values and all hidden states."""
        tables = self.tables(default_positions(x) if positions is None else positions)

        def body(x: jax.Array, block: Block) -> tuple[jax.Array, tuple]:
            x, key, value = block.self_attention(x, mask, tables)
            x = block.feed_forward(x)
            return x, (*((key, value) if cache else (None, None)), x if states else None)

        config = self.config
        embedded = x
        x = reshard(x, "batch", positions_axis(x.shape[1]), None)
        x, (keys, values, outputs) = jax.lax.scan(
            remat(body, config.remat), x, self.blocks, unroll=min(config.unroll, config.depth)
        )
        hidden = reshard(self.norm(x), "batch", None, None)
        if states:
            outputs = reshard(outputs, None, "batch", None, None)
            outputs = jnp.concatenate([embedded[None], outputs[:-1], hidden[None]])
        return hidden, keys, values, outputs

    def decode(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One token per row, int32 [B] → next logits float32 [B, V] and the advanced cache."""
        x = self.embed_tokens(token[:, None])
        slots = jnp.arange(cache.visible.shape[1])
        visible = cache.visible | (slots == cache.length)[None]
        tables = self.tables(cache.positions[:, None])
        mask = Keys(visible)

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
            block, keys, values = layer
            x, keys, values = block.decode(x, keys, values, cache.length, mask, tables)
            return x, (keys, values)

        x, (keys, values) = jax.lax.scan(body, x, (self.blocks, cache.keys, cache.values))
        advanced = Cache(keys, values, visible, cache.positions + 1, cache.length + 1)
        return self.logits(self.norm(x))[:, 0], advanced


def default_positions(x: jax.Array) -> jax.Array:
    """Positions 0…T−1 for every row of [B, T, …], as int32 [1, T]."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None]


def mask_positions(valid: jax.Array) -> jax.Array:
    """Generation's rotary positions, cumsum(mask) − 1; masked places get 1 as in the release."""
    positions = jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1
    return jnp.where(valid, positions, 1)


def segment_positions(segments: jax.Array) -> jax.Array:
    """Positions within each run of one number: int32 [B, T] → int32 [B, T]."""
    index = default_positions(segments)
    begins = segments[:, 1:] != segments[:, :-1]
    starts = jnp.where(jnp.pad(begins, ((0, 0), (1, 0))), index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def make_cache(keys: jax.Array, values: jax.Array, valid: jax.Array, length: int) -> Cache:
    """Pad a prefill's keys and values [L, B, T, K, D] to `length` slots.

    Raises:
        ValueError: the prompt does not leave room for a single new token.
    """
    filled = keys.shape[2]
    if length <= filled:
        raise ValueError(f"cache of {length} slots cannot extend a prompt of {filled} positions")
    room = ((0, 0), (0, 0), (0, length - filled), (0, 0), (0, 0))
    return Cache(
        keys=jnp.pad(keys, room),
        values=jnp.pad(values, room),
        visible=jnp.pad(valid, ((0, 0), (0, length - filled))),
        positions=jnp.sum(valid, axis=1, dtype=jnp.int32),
        length=jnp.asarray(filled, jnp.int32),
    )


def last_valid(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Row-wise pick at index (number of valid tokens − 1): [B, T, W] → [B, W].

    With right padding that is the end-of-sequence token; the release counts in the same way.
    """
    index = jnp.sum(valid, axis=1) - 1
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
