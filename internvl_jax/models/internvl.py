"""InternVL-C and InternVL-G: one image–text model with two image features.

C (contrastive): attention pooling over the vision tower. G (generative): the sum of that and the
pooled outputs of QLLaMA's queries, each of unit length (the release; the paper's text mentions only
the latter). Text: the LLaMA trunk's state at the end token times `text_projection`, for both.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.kernels import Causal, Full, Keys, Mask, Prefix
from internvl_jax.models import qllama
from internvl_jax.models.attention import AttentionPool, CrossAttention
from internvl_jax.models.config import InternVLConfig
from internvl_jax.models.layers import EMBEDDING_STD, Linear, normal, stack
from internvl_jax.models.llama import (
    Cache,
    Llama,
    last_valid,
    make_cache,
    mask_positions,
)
from internvl_jax.models.vit import ViT
from internvl_jax.sharding import spec

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


def unit(x: jax.Array) -> jax.Array:
    """Rows of length one, float32 (no epsilon, as in the release)."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class InternVL(nnx.Module):
    """Vision tower, LLaMA, pooling heads; with queries also cross-attention and matching head."""

    def __init__(self, config: InternVLConfig, key: jax.Array):
        keys = iter(jax.random.split(key, 8))
        vit, llama = config.vit, config.llama
        self.config = config
        self.vit = ViT(vit, next(keys))
        self.llama = Llama(llama, next(keys), language_head=config.num_queries > 0)
        self.pool = AttentionPool(
            vit.width, config.embed_dim, config.pool_heads, "vit_wide", next(keys)
        )
        self.text_projection = normal(
            next(keys), (llama.width, config.embed_dim), ("embed", None), llama.width**-0.5
        )
        self.logit_scale = nnx.Param(jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32))
        if config.num_queries:
            # The paper initialises queries randomly; the release's zeros make all of them equal.
            self.queries = normal(
                next(keys), (config.num_queries, llama.width), (None, None), EMBEDDING_STD
            )
            self.cross = stack(
                lambda k: CrossAttention(llama, vit.width, k), config.num_cross, next(keys)
            )
            last, head = jax.random.split(next(keys))
            self.pool2 = AttentionPool(
                llama.width, config.embed_dim, config.pool_heads, "embed", last
            )
            self.match_head = Linear(llama.width, 2, head, axes=("embed", None), bias=True)

    # ---- images -------------------------------------------------------------------------------

    def vision(
        self, pixels: jax.Array, *, mask_ratio: float = 0.0, keys: jax.Array | None = None
    ) -> jax.Array:
        """Pixels [B, H, W, 3] → vision tokens [B, 1 + N, D]; keys [B] for training."""
        return self.vit(pixels, mask_ratio=mask_ratio, keys=keys)

    def query_embeddings(self, rows: int) -> jax.Array:
        """The learnable queries repeated over the batch, [rows, Q, W]."""
        if not self.config.num_queries:
            raise ValueError("this is an InternVL-C without middleware; mode 'g' needs queries")
        queries = self.queries[...].astype(self.config.llama.dtype)
        out = spec("batch", None, None)
        return jnp.broadcast_to(queries, (rows, *queries.shape), out_sharding=out)

    def middleware(
        self,
        x: jax.Array,
        vision: jax.Array,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        states: bool = False,
        cache: bool = False,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]:
        """QLLaMA over embeddings [B·r, Q + T, W]; see `qllama.run`."""
        return qllama.run(
            self.llama,
            self.cross,
            x,
            vision,
            queries=self.config.num_queries,
            cross_every=self.config.cross_every,
            mask=mask,
            positions=positions,
            states=states,
            cache=cache,
        )

    def query_outputs(self, vision: jax.Array) -> jax.Array:
        """Vision tokens [B, N, D] → final-norm query states [B, Q, W] (queries alone)."""
        x = self.query_embeddings(vision.shape[0])
        return self.middleware(x, vision, mask=Full())[0]

    def image_features(self, vision: jax.Array, mode: str) -> jax.Array:
        """Un-normalised image features [B, E] of vision tokens; mode "c" or "g"."""
        pooled = self.pool(vision)
        if mode == "c":
            return pooled
        if mode != "g":
            raise ValueError(f"mode {mode!r}: choose 'c' (InternVL-C) or 'g' (InternVL-G)")
        queries = self.query_outputs(vision)
        return unit(pooled) + unit(self.pool2(queries))

    def encode_image(self, pixels: jax.Array, mode: str = "c") -> jax.Array:
        """Images → un-normalised features float [B, E]."""
        return self.image_features(self.vision(pixels), mode)

    # ---- text ---------------------------------------------------------------------------------

    def text_states(self, ids: jax.Array) -> jax.Array:
        """Final-norm states [B, T, W] of text alone; id 0 is padding."""
        mask = Causal() & Keys(ids > 0)
        return self.llama(self.llama.embed_tokens(ids), mask=mask)

    def project_text(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        """State of the end token times `text_projection`: [B, T, W] → [B, E]."""
        last = last_valid(states, valid)
        kernel = self.text_projection[...].astype(last.dtype)
        return jnp.einsum("bd,de->be", last, kernel, out_sharding=spec("batch", None))

    def encode_text(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, T], right-padded with 0 → un-normalised features [B, E]."""
        return self.project_text(self.text_states(ids), ids > 0)

    def similarity(self, image_features: jax.Array, text_features: jax.Array) -> jax.Array:
        """exp(logit_scale) · cosine, logits per image [I, T]."""
        cosine = jnp.einsum("ie,te->it", unit(image_features), unit(text_features))
        return jnp.exp(self.logit_scale[...]) * cosine

    # ---- matching and captions ----------------------------------------------------------------

    def match_logits(self, query_states: jax.Array) -> jax.Array:
        """Mean over the queries of the matching head, [B, Q, W] → float32 [B, 2]; 1 = match."""
        return jnp.mean(self.match_head(query_states).astype(jnp.float32), axis=1)

    def prefill(
        self, vision: jax.Array, ids: jax.Array, length: int
    ) -> tuple[jax.Array, Cache]:
        """Start captioning: [queries | prompt] through the middleware.

        Args:
            vision: [B, N, D] vision tokens.
            ids: int32 [B, T] prompt with beginning token and without end token; 0 is padding, on
                either side.
            length: slots of the cache, at least Q + T + new tokens.

        Returns:
            Logits of the first new token [B, V], and the cache.
        """
        queries = self.query_embeddings(ids.shape[0])
        x = jnp.concatenate([queries, self.llama.embed_tokens(ids)], axis=1)
        valid = jnp.concatenate([jnp.ones_like(queries[..., 0], bool), ids > 0], axis=1)
        mask = Prefix(self.config.num_queries) & Keys(valid)
        hidden, keys, values, _ = self.middleware(
            x, vision, mask=mask, positions=mask_positions(valid), cache=True
        )
        last = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self.llama.logits(hidden)[:, 0], make_cache(keys, values, valid, length)

    def decode(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """One more token per row; the image is seen through the cached queries."""
        return self.llama.decode(token, cache)
