"""Unit-length image and text features of whole arrays, in batches of one shape.

Every evaluator that compares images with texts goes through the two compiled functions here, so a
model is compiled once per image size and text length, however many evaluators use it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.models import init
from internvl_jax.models.config import InternVLConfig
from internvl_jax.sharding import axis_size, place_batch, replicate

Params = dict[str, Any]
_COLUMNS = 32  # texts are cut to a multiple of this: few lengths, hence few compilations


def in_batches(
    function: Callable[..., Any], arrays: tuple[np.ndarray, ...], batch_size: int
) -> Any:
    """Apply a compiled function to arrays with a common leading axis, batch by batch.

    The last batch is filled up with copies of its first row, whose results are dropped: every call
    has the same shape and nothing is compiled twice. Under a mesh the batch size is rounded up to
    a multiple of the devices that share it, and each batch is placed over them.

    Args:
        function: takes one batch of each array, returns a pytree with the same leading axis.
        arrays: each [N, ...].

    Returns:
        The pytree of the results, numpy arrays [N, ...].
    """
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        pieces = axis_size(mesh, "batch")
        batch_size = -(-batch_size // pieces) * pieces
    total = len(arrays[0])
    if total == 0:
        raise ValueError("there is nothing to evaluate: the arrays are empty")
    results, running = [], None
    for start in range(0, total, batch_size):
        batch = [array[start : start + batch_size] for array in arrays]
        count = len(batch[0])
        batch = [np.concatenate([a, np.repeat(a[:1], batch_size - count, 0)]) for a in batch]
        output = function(*place_batch(batch))
        # The device works on this batch while the host fetches the one before.
        if running is not None:
            results.append(_fetch(*running))
        running = output, count
    results.append(_fetch(*running))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _fetch(output: Any, count: int) -> Any:
    return jax.tree.map(lambda array: np.asarray(jax.device_get(array))[:count], output)


def unit(features: jax.Array) -> jax.Array:
    """Float32 rows of length 1, [..., E]."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("config", "mode"))
def _image_features(params: Params, pixels: jax.Array, *, config, mode: str) -> jax.Array:
    return replicate(unit(init.bind(config, params).encode_image(pixels, mode=mode)))


@functools.partial(jax.jit, static_argnames=("config",))
def _text_features(params: Params, ids: jax.Array, *, config) -> jax.Array:
    return replicate(unit(init.bind(config, params).encode_text(ids)))


def image_features(
    config: InternVLConfig, params: Params, images: np.ndarray, mode: str, batch_size: int = 100
) -> np.ndarray:
    """uint8 [N, H, W, 3] → unit features [N, E] of InternVL-C ("c") or InternVL-G ("g")."""
    step = functools.partial(_image_features, params, config=config, mode=mode)
    return in_batches(step, (images,), batch_size)


def text_features(
    config: InternVLConfig, params: Params, ids: np.ndarray, batch_size: int = 100
) -> np.ndarray:
    """int32 [N, L], right-padded with 0 → unit features [N, E].

    Columns of padding are left out, 32 at a time, which changes no feature.
    """
    longest = int(np.max(np.sum(ids > 0, axis=1)))
    ids = ids[:, : -(-longest // _COLUMNS) * _COLUMNS]
    step = functools.partial(_text_features, params, config=config)
    return in_batches(step, (ids,), batch_size)
