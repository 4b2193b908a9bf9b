"""Re-ranking of retrieved pairs by the matching head of InternVL-G (paper §3.3, its ITM loss)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.evals import features
from internvl_jax.kernels import ITM, Keys, Middleware
from internvl_jax.models import InternVLConfig, bind
from internvl_jax.sharding import replicate


@functools.partial(jax.jit, static_argnames=("config",))
def _match(params: features.Params, pixels: jax.Array, ids: jax.Array, *, config) -> jax.Array:
    model = bind(config, params)
    vision = model.vision(pixels)
    queries = model.query_embeddings(ids.shape[0])
    x = jnp.concatenate([queries, model.llama.embed_tokens(ids)], axis=1)
    valid = jnp.concatenate([jnp.ones_like(queries[..., 0], bool), ids > 0], axis=1)
    mode = jnp.full_like(ids[:, 0], ITM)
    mask = Middleware(config.num_queries, mode) & Keys(valid)
    hidden = model.middleware(x, vision, mask=mask)[0][:, : config.num_queries]
    return replicate(jax.nn.log_softmax(model.match_logits(hidden), axis=-1)[:, 1])


def rerank(
    config: InternVLConfig,
    params: features.Params,
    images: np.ndarray,
    ids: np.ndarray,
    hits: np.ndarray,
    rank: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    *,
    image_queries: bool,
    batch_size: int = 100,
) -> tuple[np.ndarray, np.ndarray]:
    """Put the best hits of every query in the order of their matching scores.

    Args:
        images: [I, H, W, 3] or `files.Pictures`; ids: int32 [T, L], cleaned captions.
        hits: [N, k] gallery indices; rank: [N], as `scores.ranks` gives them.
        image_queries: the queries are images and the gallery texts; else the other way round.

    Returns:
        Hits and ranks after re-ranking. A query whose right entry is not among its hits keeps its
        rank. Ties count against the model, as everywhere.
    """
    count, k = hits.shape
    queries = np.repeat(np.arange(count), k)
    first, second = (queries, hits.ravel()) if image_queries else (hits.ravel(), queries)
    pixels = _Picked(images, first)
    step = functools.partial(_match, params, config=config)
    score = features.in_batches(step, (pixels, ids[second]), batch_size).reshape(count, k)
    right = gallery_ids[hits] == query_ids[:, None]
    best = np.where(right, score, -np.inf).max(axis=1, keepdims=True)
    within = np.sum(~right & ~(score < best), axis=1)
    order = np.argsort(-score, axis=1, kind="stable")
    ranks = np.where(right.any(axis=1), within, np.maximum(rank, k))
    return np.take_along_axis(hits, order, 1), ranks


class _Picked:
    """Rows of an array or of `files.Pictures` in any order, taken when a slice is asked for."""

    def __init__(self, images: np.ndarray, index: np.ndarray):
        self.images, self.index = images, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> np.ndarray:
        index = self.index[part]
        if isinstance(self.images, np.ndarray):
            return self.images[index]
        distinct, where = np.unique(index, return_inverse=True)
        return self.images.take(distinct)[where]
