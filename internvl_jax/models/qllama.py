"""QLLaMA, the language middleware: a LLaMA whose first positions are learnable queries.

Queries cross-attend to the vision tokens in layers 0, k, 2k, … (arXiv 2312.14238 §3.2; k = 2 in
the release). Cross-attention sits between self-attention and MLP and updates only the query
positions; text passes it unchanged and sees the image through the queries' keys and values.

The LLaMA layers stay stacked as in `Llama`, so a language model's weights are the trunk as they
are; the cross-attention layers are a second, shorter stack. The scan runs over groups of k layers
(one cross-attending, k − 1 plain), then over what is left of the depth.
"""

from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.kernels import Mask, attention
from internvl_jax.models.attention import CrossAttention, merge_heads
from internvl_jax.models.layers import remat
from internvl_jax.models.llama import Block, Llama, default_positions
from internvl_jax.sharding import spec


def cross_attend(cross: CrossAttention, x: jax.Array, vision: jax.Array, queries: int) -> jax.Array:
    """Update the first `queries` positions of [B·r, T, W] from vision tokens [B, N, D].

    r rows in a row may share one image (the three text groups of stage 2): their queries are laid
    side by side, so that an image's keys and values are computed once.
    """
    rows, images = x.shape[0], vision.shape[0]
    repeat, width = rows // images, x.shape[-1]
    head, rest = x[:, :queries], x[:, queries:]
    wide = spec("batch", None, None)
    packed = jnp.reshape(head, (images, repeat * queries, width), out_sharding=wide)
    with jax.named_scope("cross_attention"):
        query, key, value = cross.project(packed, vision)
        mixed = merge_heads(attention(query, key, value), "heads")
        update = cross.o(mixed)
    update = jnp.reshape(update, (rows, queries, width), out_sharding=wide)
    return jnp.concatenate([head + update, rest], axis=1)


def run(
    llama: Llama,
    cross: CrossAttention,
    x: jax.Array,
    vision: jax.Array,
    *,
    queries: int,
    cross_every: int,
    mask: Mask,
    positions: jax.Array | None = None,
    states: bool = False,
    cache: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
    """The middleware over [queries | text].

    Args:
        llama, cross: the trunk and its stacked cross-attention layers.
        x: [B·r, Q + T, W] embeddings; r consecutive rows share an image.
        vision: [B, N, D] vision tokens, class token included.
        queries: Q, the number of leading query positions.
        cross_every: k; layers 0, k, 2k, … cross-attend.
        mask: over the whole sequence.
        positions: rotary positions, 0…Q+T−1 by default.
        states, cache: also return all hidden states, or stacked keys and values.

    Returns:
        Final-norm hidden states [B·r, Q + T, W]; keys and values [L, B·r, Q + T, K, D] or None;
        hidden states [L + 1, …] in `Llama`'s convention or None.
    """
    config = llama.config
    tables = llama.tables(default_positions(x) if positions is None else positions)

    def layer(x: jax.Array, block: Block, crossing: CrossAttention | None) -> tuple:
        x, key, value = block.self_attention(x, mask, tables)
        if crossing is not None:
            x = cross_attend(crossing, x, vision, queries)
        x = block.feed_forward(x)
        return x, (*((key, value) if cache else (None, None)), x if states else None)

    def group(x: jax.Array, members: tuple[Block, CrossAttention]) -> tuple[jax.Array, tuple]:
        blocks, crossing = members
        outputs = []
        for index in range(jax.tree.leaves(blocks)[0].shape[0]):
            block = jax.tree.map(lambda a, i=index: a[i], blocks)
            x, output = layer(x, block, crossing if index == 0 else None)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    embedded = x
    groups, left = divmod(config.depth, cross_every)
    collected = []
    body = remat(group, config.remat)
    if groups:
        blocks = jax.tree.map(lambda a: _grouped(a, groups, cross_every), llama.blocks)
        crossings = jax.tree.map(lambda a: a[:groups], cross)
        unroll = min(max(config.unroll // cross_every, 1), groups)
        x, outputs = jax.lax.scan(body, x, (blocks, crossings), unroll=unroll)
        collected.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs))
    if left:
        blocks = jax.tree.map(lambda a: a[groups * cross_every :], llama.blocks)
        x, outputs = body(x, (blocks, jax.tree.map(lambda a: a[groups], cross)))
        collected.append(outputs)
    keys, values, outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *collected)
    hidden = llama.norm(x)
    if states:
        outputs = jnp.concatenate([embedded[None], outputs[:-1], hidden[None]])
    return hidden, keys, values, outputs


def _grouped(stacked: jax.Array, groups: int, size: int) -> Any:
    """[L, …] → [groups, size, …], leaving out what does not fill a group."""
    return stacked[: groups * size].reshape(groups, size, *stacked.shape[1:])
