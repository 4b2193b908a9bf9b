"""InternVL-Chat: image tokens in the language model's input (arXiv 2312.14238 §3.4, Fig. 4c–d).

Each image position of the prompt carries the id `IMAGE_TOKEN`; its embedding is replaced, in order,
by the projected features of the example's images.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.kernels import Causal, Full, Keys, Segments
from internvl_jax.models import qllama
from internvl_jax.models.attention import CrossAttention
from internvl_jax.models.config import ChatConfig, LanguageModelConfig
from internvl_jax.models.layers import (
    EMBEDDING_STD,
    LayerNorm,
    Linear,
    Mlp,
    gelu,
    normal,
    stack,
)
from internvl_jax.models.llama import Cache, Llama, make_cache, mask_positions, segment_positions
from internvl_jax.models.vit import ViT
from internvl_jax.sharding import spec

IMAGE_TOKEN = -200  # placeholder id of one image position (LLaVA's convention)


def pixel_shuffle(x: jax.Array, fold: int, version: str) -> jax.Array:
    """Fold k×k neighbouring patches into the channels: [B, G², D] → [B, (G/k)², k²·D], k = `fold`.

    Version "v1" (InternVL 1.1 and 1.2) leaves the token grid transposed, "v2" does not.
    """
    batch, count, width = x.shape
    side = math.isqrt(count)
    small = side // fold
    out = spec("batch", None, None, None)
    x = jnp.reshape(x, (batch, side, small, fold * width), out_sharding=out).transpose(0, 2, 1, 3)
    x = jnp.reshape(x, (batch, small, small, fold * fold * width), out_sharding=out)
    x = x.transpose(0, 2, 1, 3) if version == "v2" else x
    out = spec("batch", None, None)
    return jnp.reshape(x, (batch, small * small, fold * fold * width), out_sharding=out)


class ShuffleProjector(nnx.Module):
    """LayerNorm → Linear → GELU → Linear on pixel-shuffled patches (official `mlp1`)."""

    def __init__(self, inputs: int, width: int, key: jax.Array):
        first, second = jax.random.split(key)
        self.norm = LayerNorm(inputs, 1e-5)
        self.fc1 = Linear(inputs, width, first, axes=(None, "embed"), bias=True)
        self.fc2 = Linear(width, width, second, axes=(None, "embed"), bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(gelu(self.fc1(self.norm(x))))


class Chat(nnx.Module):
    """Vision tower, projector(s), language model; optionally QLLaMA in between."""

    def __init__(self, config: ChatConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 7))
        vit, llm = config.vit, config.llm
        axes = (None, "embed", None)
        self.config = config
        self.vit = ViT(vit, next(keys))
        self.llm = Llama(llm, next(keys))
        if config.projector == "pixel_shuffle":
            self.projector = ShuffleProjector(config.shuffle**2 * vit.width, llm.width, next(keys))
        else:
            self.projector = Mlp(vit.width, llm.width, llm.width, next(keys), axes=axes)
        if config.middleware is not None:
            inner = config.middleware
            self.llama = Llama(inner.llama, next(keys), language_head=False)
            self.queries = normal(
                next(keys), (inner.num_queries, inner.llama.width), (None, None), EMBEDDING_STD
            )
            self.cross = stack(
                lambda k: CrossAttention(inner.llama, vit.width, k), inner.num_cross, next(keys)
            )
            self.query_projector = Mlp(
                inner.llama.width, llm.width, llm.width, next(keys), axes=axes
            )

    def image_features(self, images: jax.Array) -> jax.Array:
        """Square images [N, H, H, 3] → language-model embeddings [N, tokens_per_image, W]."""
        config = self.config
        last, states = self.vit(images, hidden_states=True)
        patches = states[config.select_layer][:, 1:]
        if config.projector == "pixel_shuffle":
            patches = pixel_shuffle(patches, config.shuffle, config.shuffle_version)
        features = self.projector(patches)
        if config.middleware is None:
            return features
        inner = config.middleware
        queries = self.queries[...].astype(inner.llama.dtype)
        out = spec("batch", None, None)
        x = jnp.broadcast_to(queries, (images.shape[0], *queries.shape), out_sharding=out)
        hidden, _, _, _ = qllama.run(
            self.llama,
            self.cross,
            x,
            last,
            queries=inner.num_queries,
            cross_every=inner.cross_every,
            mask=Full(),
        )
        return jnp.concatenate([self.query_projector(hidden), features], axis=1)

    def embed(
        self, tokens: jax.Array, images: jax.Array, present: jax.Array | None = None
    ) -> jax.Array:
        """Token embeddings with image features in the image positions.

        Args:
            tokens: int32 [B, T]; `IMAGE_TOKEN`, or the configuration's `image_token_id`, marks
                image positions.
            images: [B, M, H, W, 3]; the features of an example's M images fill its image positions
                in order. Features beyond the positions (an example with fewer images) are unused.
            present: bool [B, M]; images that are not present are passed over. None: all are.
        """
        batch, count = images.shape[:2]
        flat = jnp.reshape(
            images, (batch * count, *images.shape[2:]), out_sharding=spec("batch", *(None,) * 3)
        )
        features = self.image_features(flat)
        size = features.shape[1]
        features = jnp.reshape(
            features, (batch, count * size, features.shape[-1]),
            out_sharding=spec("batch", None, None),
        )
        here = tokens == IMAGE_TOKEN
        if self.config.image_token_id is not None:
            here |= tokens == self.config.image_token_id
        order = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, count * size - 1)
        if present is not None:
            first = jnp.argsort(~present.astype(bool), axis=1, stable=True)  # present ones first
            order = jnp.take_along_axis(first, order // size, axis=1) * size + order % size
        placed = jnp.take_along_axis(features, order[..., None], axis=1)
        words = self.llm.embed_tokens(tokens)
        return jnp.where(here[..., None], placed.astype(words.dtype), words)

    def hidden(
        self,
        tokens: jax.Array,
        images: jax.Array,
        *,
        valid: jax.Array | None = None,
        present: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """Final-norm states [B, T, W].

        valid: bool [B, T], which positions hold text or image; None: those whose id is not 0.
        segments: int32 [B, T] of a packed row, the number of each token's conversation, 0 for
          padding; each is read alone, its positions count from 0, and its images follow those of
          the conversations before. The rest is as for `embed`.
        """
        x = self.embed(tokens, images, present)
        if segments is not None:
            mask = Causal() & Segments(segments, segments)
            return self.llm(x, mask=mask, positions=segment_positions(segments))
        mask = Causal() & Keys(tokens != 0 if valid is None else valid)
        return self.llm(x, mask=mask)

    def __call__(
        self,
        tokens: jax.Array,
        images: jax.Array,
        *,
        valid: jax.Array | None = None,
        present: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits float32 [B, T, V]; arguments as for `hidden`."""
        return self.llm.logits(self.hidden(tokens, images, valid=valid, present=present))

    def prefill(
        self,
        tokens: jax.Array,
        images: jax.Array,
        length: int,
        *,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Start an answer: the whole prompt, padded on either side (`valid` as for a call).

        Returns:
            Logits of the first new token [B, V], and a cache of `length` slots.
        """
        valid = tokens != 0 if valid is None else valid
        return prefill(self.llm, self.embed(tokens, images), valid, length)

    def decode(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One more token per row."""
        return self.llm.decode(token, cache)


class LanguageModel(nnx.Module):
    """A bare LLaMA (stage 0)."""

    def __init__(self, config: LanguageModelConfig, key: jax.Array):
        self.config = config
        self.llama = Llama(config.llama, key)

    def hidden(self, tokens: jax.Array) -> jax.Array:
        """Final-norm states [B, T, W]; id 0 is padding."""
        mask = Causal() & Keys(tokens > 0)
        return self.llama(self.llama.embed_tokens(tokens), mask=mask)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Next-token logits float32 [B, T, V]; id 0 is padding."""
        return self.llama.logits(self.hidden(tokens))

    def prefill(self, tokens: jax.Array, length: int) -> tuple[jax.Array, Cache]:
        """Start a continuation of prompts padded with 0 on either side."""
        return prefill(self.llama, self.llama.embed_tokens(tokens), tokens > 0, length)

    def decode(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One more token per row."""
        return self.llama.decode(token, cache)


def prefill(
    llama: Llama, x: jax.Array, valid: jax.Array, length: int
) -> tuple[jax.Array, Cache]:
    """Causal prefill of embeddings [B, T, W] with padding anywhere outside the text."""
    hidden, keys, values, _ = llama.run(
        x, mask=Causal() & Keys(valid), positions=mask_positions(valid), cache=True
    )
    last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    return llama.logits(hidden)[:, 0], make_cache(keys, values, valid, length)
