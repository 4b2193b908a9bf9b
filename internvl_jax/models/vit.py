"""InternViT, the vision encoder (arXiv 2312.14238 §3.2, Table 1; released `InternVisionModel`).

Pre-norm transformer with LayerScale and stochastic depth, class token first, QK-normalisation over
the full width, and no final norm: the output is the raw residual stream.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.attention import ViTAttention
from internvl_jax.models.config import VisionConfig, ViTConfig
from internvl_jax.models.layers import (
    EMBEDDING_STD,
    LayerNorm,
    Linear,
    Mlp,
    RMSNorm,
    constant,
    drop_path,
    normal,
    remat,
    split_each,
    stack,
    uniform_each,
)
from internvl_jax.models.positions import resize_position_embedding
from internvl_jax.sharding import spec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pixels: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] → float32 with ImageNet statistics; floats pass through untouched."""
    if pixels.dtype != jnp.uint8:
        return pixels
    scaled = pixels.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


def patchify(pixels: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, 3] → [B, (H/p)·(W/p), p·p·3]: row-major grid, each patch in (row, column, channel).

    Raises:
        ValueError: the image is not a whole number of patches.
    """
    batch, height, width, channels = pixels.shape
    if height % patch or width % patch:
        raise ValueError(f"image of {height}×{width} pixels is not a multiple of patch {patch}")
    rows, columns = height // patch, width // patch
    out = spec("batch", *(None,) * 5)
    grid = jnp.reshape(
        pixels, (batch, rows, patch, columns, patch, channels), out_sharding=out
    ).transpose(0, 1, 3, 2, 4, 5)
    shape = (batch, rows * columns, patch * patch * channels)
    return jnp.reshape(grid, shape, out_sharding=spec("batch", None, None))


class Block(nnx.Module):
    """x + drop(ls1 ⊙ attention(norm1 x)), then x + drop(ls2 ⊙ mlp(norm2 x))."""

    def __init__(self, config: ViTConfig, key: jax.Array):
        first, second = jax.random.split(key)
        norm = RMSNorm if config.norm == "rmsnorm" else LayerNorm
        width = config.width
        self.norm1 = norm(width, config.eps)
        self.attn = ViTAttention(config, first)
        self.ls1 = constant(config.layer_scale, (width,))
        self.norm2 = norm(width, config.eps)
        self.mlp = Mlp(width, config.mlp_dim, width, second, axes=(None, "vit_wide", None))
        self.ls2 = constant(config.layer_scale, (width,))

    def __call__(self, x: jax.Array, rate: jax.Array, keys: jax.Array | None) -> jax.Array:
        first, second = (None, None) if keys is None else split_each(keys, 2)
        with jax.named_scope("attention"):
            x = x + drop_path(self.attn(self.norm1(x), self.ls1[...]), rate, first)
        with jax.named_scope("mlp"):
            return x + drop_path(self.mlp(self.norm2(x), self.ls2[...]), rate, second)


class ViT(nnx.Module):
    """The vision tower: pixels → residual stream of 1 + N tokens."""

    def __init__(self, config: ViTConfig, key: jax.Array):
        patch, token, position, blocks = jax.random.split(key, 4)
        self.config = config
        width = config.width
        self.patch_embed = Linear(
            config.patch_size**2 * 3, width, patch, axes=(None, "vit_wide"), bias=True
        )
        self.class_embedding = normal(token, (width,), (None,), EMBEDDING_STD)
        self.position_embedding = normal(
            position, (1 + config.grid**2, width), (None, None), EMBEDDING_STD
        )
        self.blocks = stack(lambda k: Block(config, k), config.depth, blocks)

    def embed(
        self, pixels: jax.Array, *, mask_ratio: float = 0.0, keys: jax.Array | None = None
    ) -> jax.Array:
        """Pixels [B, H, W, 3] → tokens [B, 1 + kept, D] with positions added.

        With `mask_ratio` > 0 and keys [B], that share of the patches is removed from the sequence,
        a different random set for each image (FLIP; paper appendix A.3); the class token stays.
        Another image size than the configured one resizes the position embedding.
        """
        config = self.config
        grid = (pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size)
        patches = patchify(normalise(pixels), config.patch_size)
        positions = resize_position_embedding(self.position_embedding[...], grid)
        batch, count, _ = patches.shape
        if mask_ratio > 0.0 and keys is not None:
            kept = count - int(count * mask_ratio)
            noise = uniform_each(keys, (count,))
            index = jnp.argsort(noise, axis=1)[:, :kept]
            patches = jnp.take_along_axis(patches, index[..., None], axis=1)
            out = spec("batch", None, None)
            patch_positions = positions[1:].at[index].get(out_sharding=out)
        else:
            patch_positions = positions[None, 1:]
        dtype = jnp.dtype(config.dtype)
        tokens = self.patch_embed(patches.astype(dtype)) + patch_positions.astype(dtype)
        first = self.class_embedding[...] + positions[0]
        first = jnp.broadcast_to(
            first.astype(dtype), (batch, 1, config.width), out_sharding=spec("batch", None, None)
        )
        return jnp.concatenate([first, tokens], axis=1)

    def __call__(
        self,
        pixels: jax.Array,
        *,
        layers: int | None = None,
        mask_ratio: float = 0.0,
        keys: jax.Array | None = None,
        hidden_states: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Run the tower.

        Args:
            pixels: [B, H, W, 3], uint8 or ImageNet-normalised floats.
            layers: stop after this many blocks (negative counts from the end as Python does over
                the depth + 1 hidden states: -1 is the last, -4 leaves out three blocks).
            mask_ratio: share of patches removed; needs `keys`.
            keys: [B], for token masking and stochastic depth of each image; None is evaluation.
            hidden_states: also return the residual stream after every block.

        Returns:
            [B, 1 + N, D]; with `hidden_states` also [depth + 1, B, 1 + N, D], whose first entry is
            the embedding.
        """
        depth = self.config.depth
        layers = depth if layers is None else layers
        layers = layers + depth + 1 if layers < 0 else layers
        if not 0 <= layers <= depth:
            raise ValueError(f"layers={layers} is outside the tower's {depth} blocks")
        for_masks, for_drops = (None, None) if keys is None else split_each(keys, 2)
        x = self.embed(pixels, mask_ratio=mask_ratio, keys=for_masks)
        last, states = self.run(x, for_drops, layers=layers, hidden_states=hidden_states)
        return (last, jnp.concatenate([x[None], states])) if hidden_states else last

    def run(
        self, x: jax.Array, keys: jax.Array | None, *, layers: int, hidden_states: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """The first `layers` blocks on embedded tokens [B, T, D].

        keys: [B], for the stochastic depth of each image; None is evaluation.
        Returns the residual stream and, with `hidden_states`, that after each block [layers, …].
        """
        stochastic = keys is not None and self.config.drop_path > 0.0
        layer_keys = split_each(keys, self.config.depth) if stochastic else None

        def body(x: jax.Array, layer: tuple) -> tuple[jax.Array, jax.Array | None]:
            block, rate, block_keys = layer
            x = block(x, rate, block_keys)
            return x, (x if hidden_states else None)

        rates = jnp.asarray(self.config.drop_path_rates(), jnp.float32)
        xs = jax.tree.map(lambda a: a[:layers], (self.blocks, rates, layer_keys))
        unroll = min(self.config.unroll, max(layers, 1))
        return jax.lax.scan(remat(body, self.config.remat), x, xs, unroll=unroll)


class VisionModel(nnx.Module):
    """The vision tower alone; its parameters lie under `vit` as in the larger models."""

    def __init__(self, config: VisionConfig, key: jax.Array):
        self.config = config
        self.vit = ViT(config.vit, key)

    def vision(self, pixels: jax.Array) -> jax.Array:
        """Pixels [B, H, W, 3] → vision tokens [B, 1 + N, D]."""
        return self.vit(pixels)
