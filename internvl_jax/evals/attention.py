"""Where a model looks in an image: the middleware's queries, and the tower's class token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.evals import features
from internvl_jax.kernels import Full
from internvl_jax.models import ChatConfig, InternVLConfig, VisionConfig, bind
from internvl_jax.models.llama import default_positions
from internvl_jax.sharding import replicate


@functools.partial(jax.jit, static_argnames=("config",))
def _maps(params: features.Params, pixels: jax.Array, *, config: InternVLConfig) -> jax.Array:
    model = bind(config, params)
    vision = model.vision(pixels)
    x = model.query_embeddings(pixels.shape[0])
    _, _, _, states = model.middleware(x, vision, mask=Full(), states=True)
    tables = model.llama.tables(default_positions(x))
    total = 0.0
    for number in range(config.num_cross):
        layer = number * config.cross_every
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], model.llama.blocks)
        cross = jax.tree.map(lambda leaf, i=number: leaf[i], model.cross)
        x, _, _ = block.self_attention(states[layer], Full(), tables)
        query, key, _ = cross.project(x, vision)
        logits = jnp.einsum("bqhd,bnhd->bhqn", query, key) * query.shape[-1] ** -0.5
        total += jax.nn.softmax(logits.astype(jnp.float32), axis=-1).mean(axis=1)
    return replicate(total / config.num_cross)


def attention_maps(
    config: InternVLConfig, params: features.Params, images: np.ndarray, batch_size: int = 100
) -> np.ndarray:
    """Attention of every query over the patches, float32 [N, Q, G, G] for uint8 [N, H, W, 3].

    Mean over the heads and cross-attention layers. A query's map sums to what it does not give to
    the class token.
    """
    step = functools.partial(_maps, params, config=config)
    maps = features.in_batches(step, (images,), batch_size)[:, :, 1:]
    side = images.shape[1] // config.vit.patch_size
    return maps.reshape(*maps.shape[:2], side, -1)


@functools.partial(jax.jit, static_argnames=("config",))
def _class_maps(params: features.Params, pixels: jax.Array, *, config) -> jax.Array:
    vit = bind(config, params).vit
    _, states = vit(pixels, hidden_states=True)

    def layer(_, xs):
        block, x = xs
        query, key, _ = block.attn.project(block.norm1(x))
        logits = jnp.einsum("bhd,bnhd->bhn", query[:, 0], key) * query.shape[-1] ** -0.5
        return None, jax.nn.softmax(logits.astype(jnp.float32), axis=-1)

    _, maps = jax.lax.scan(layer, None, (vit.blocks, states[:-1]))
    return replicate(jnp.swapaxes(maps, 0, 1))


def class_token_maps(
    config: InternVLConfig | ChatConfig | VisionConfig,
    params: features.Params,
    images: np.ndarray,
    batch_size: int = 100,
) -> np.ndarray:
    """The class token's attention over the patches in every block and head of the vision tower.

    float32 [N, depth, H, G, G] for uint8 [N, H, W, 3]. A map sums to what the class token does not
    give to itself.
    """
    step = functools.partial(_class_maps, params, config=config)
    maps = features.in_batches(step, (images,), batch_size)[..., 1:]
    side = images.shape[1] // config.vit.patch_size
    return maps.reshape(*maps.shape[:3], side, -1)
