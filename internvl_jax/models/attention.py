"""Attention sublayers: project, normalise, rotate, attend, project back."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from internvl_jax import kernels
from internvl_jax.kernels import Mask
from internvl_jax.models.config import LlamaConfig, ViTConfig
from internvl_jax.models.layers import LayerNorm, Linear, RMSNorm, together
from internvl_jax.models.rope import Tables, rotate
from internvl_jax.sharding import spec


def split_heads(x: jax.Array, heads: int, axis: str | None = None) -> jax.Array:
    """[B, T, H·D] → [B, T, H, D]."""
    out = spec("batch", None, axis, None)
    return jnp.reshape(x, (*x.shape[:-1], heads, x.shape[-1] // heads), out_sharding=out)


def merge_heads(x: jax.Array, axis: str | None = None) -> jax.Array:
    """[B, T, H, D] → [B, T, H·D]."""
    out = spec("batch", None, axis)
    return jnp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3]), out_sharding=out)


class ViTAttention(nnx.Module):
    """InternViT self-attention: fused qkv, RMSNorm of q and k over the full width, no mask."""

    def __init__(self, config: ViTConfig, key: jax.Array):
        first, second = jax.random.split(key)
        width = config.width
        self.heads = config.num_heads
        self.qkv = Linear(width, 3 * width, first, axes=(None, "vit_wide"), bias=config.qkv_bias)
        self.eps = config.eps if config.qk_eps is None else config.qk_eps
        self.q_norm = RMSNorm(width, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(width, self.eps) if config.qk_norm else None
        self.proj = Linear(width, width, second, axes=(None, "vit_wide"), bias=True)

    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """[B, N, D] → [B, N, D], times `scale` [D]."""
        norms = None if self.q_norm is None else (self.q_norm.scale[...], self.k_norm.scale[...])
        mixed = kernels.attention_qkv(
            checkpoint_name(self.qkv(x), "qkv"),
            num_heads=self.heads,
            qk_norm=norms,
            eps=self.eps,
        )
        return self.proj(mixed, scale=scale)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys as they meet, and values, each [B, N, H, D]: for looking at them."""
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (split_heads(a, self.heads) for a in (query, key, value))
        return query, key, value


class LlamaAttention(nnx.Module):
    """LLaMA self-attention with rotary positions and grouped queries.

    `qkv_bias` is Qwen2's variant, `qk_norm` (per head) Qwen3's.
    """

    def __init__(self, config: LlamaConfig, key: jax.Array):
        q, k, v, o = jax.random.split(key, 4)
        width, dim = config.width, config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        bias = config.qkv_bias
        self.q = Linear(width, self.heads * dim, q, axes=("embed", "heads"), bias=bias)
        self.k = Linear(width, self.kv_heads * dim, k, axes=("embed", "kv_heads"), bias=bias)
        self.v = Linear(width, self.kv_heads * dim, v, axes=("embed", "kv_heads"), bias=bias)
        self.o = Linear(self.heads * dim, width, o, axes=("heads", "embed"), bias=config.o_bias)
        self.q_norm = RMSNorm(dim, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.eps) if config.qk_norm else None

    def project(
        self, x: jax.Array, tables: Tables
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, T, H, D], rotated keys and values [B, T, K, D]."""
        query, key, value = together(x, (self.q, self.k, self.v), "heads")
        query, key, value = (checkpoint_name(a, "qkv") for a in (query, key, value))
        query = split_heads(query, self.heads, "heads")
        key, value = (split_heads(a, self.kv_heads, "kv_heads") for a in (key, value))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, tables), rotate(key, tables), value

    def attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: Mask,
        positions: str | None = None,
    ) -> jax.Array:
        """Attention and output projection: [B, T, W], its positions laid as their name says."""
        mixed = merge_heads(kernels.attention(query, key, value, mask=mask), "heads")
        return self.o(mixed, positions=positions)


class CrossAttention(nnx.Module):
    """QLLaMA cross-attention: queries look at all vision tokens, class token included.

    Both sides are RMS-normalised first; no mask, no rotary positions, no biases, plain residual
    (spec of QLLaMA in arXiv 2312.14238 §3.2 and its release).
    """

    def __init__(self, config: LlamaConfig, vision_width: int, key: jax.Array):
        q, k, v, o = jax.random.split(key, 4)
        width, inner = config.width, config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.norm1 = RMSNorm(width, config.eps)
        self.norm2 = RMSNorm(vision_width, config.eps)
        self.q = Linear(width, inner, q, axes=("embed", "heads"))
        self.k = Linear(vision_width, inner, k, axes=("embed", "heads"))
        self.v = Linear(vision_width, inner, v, axes=("embed", "heads"))
        self.o = Linear(inner, width, o, axes=("heads", "embed"))

    def project(
        self, x: jax.Array, vision: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, Q, H, D] of `x` [B, Q, W]; keys and values [B, N, H, D] of `vision`."""
        vision = self.norm2(vision.astype(x.dtype))
        query = checkpoint_name(self.q(self.norm1(x), "heads"), "qkv")
        query = split_heads(query, self.heads, "heads")
        key, value = (
            checkpoint_name(a, "qkv") for a in together(vision, (self.k, self.v), "heads")
        )
        key, value = (split_heads(a, self.heads, "heads") for a in (key, value))
        return query, key, value

    def __call__(self, x: jax.Array, vision: jax.Array) -> jax.Array:
        """Residual update for the query positions, [B, Q, W]."""
        query, key, value = self.project(x, vision)
        mixed = merge_heads(kernels.attention(query, key, value), "heads")
        return self.o(mixed)


class AttentionPool(nnx.Module):
    """Attention pooling head: the mean token asks all tokens once (official `clip_projector`).

    Three separate LayerNorms (eps 1e-5) for the seed, the keys and the values; output projection
    to the shared embedding; no residual and no MLP.
    """

    EPS = 1e-5

    def __init__(self, width: int, outputs: int, heads: int, axis: str, key: jax.Array):
        q, k, v, out = jax.random.split(key, 4)
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (LayerNorm(width, self.EPS) for _ in range(3))
        axes = (None, axis) if axis == "vit_wide" else (axis, None)
        self.q = Linear(width, width, q, axes=axes, bias=True)
        self.k = Linear(width, width, k, axes=axes, bias=True)
        self.v = Linear(width, width, v, axes=axes, bias=True)
        self.proj = Linear(width, outputs, out, axes=(axis, None), bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, C] → [B, E]."""
        seed = self.norm_q(jnp.mean(x, axis=1, keepdims=True))
        query = split_heads(self.q(seed), self.heads)
        key = split_heads(self.k(self.norm_k(x)), self.heads)
        value = split_heads(self.v(self.norm_v(x)), self.heads)
        pooled = merge_heads(kernels.attention(query, key, value))  # [B, 1, C]
        return self.proj(pooled)[:, 0]


