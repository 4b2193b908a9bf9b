"""Generation for callers with lists of prompts: few shapes, so few compilations, and host results.

Prompts of different lengths are padded on the left to a common bucket, and the number of rows up to
a power of two; neither changes a result. Reading the prompts and continuing them are two compiled
programs, so other settings of the search do not compile the model's prefill again. `stream` gives
the tokens one by one as they are chosen, each row by its own settings.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import generate
from internvl_jax.decoding import Decoding, Generated
from internvl_jax.models import ChatConfig, InternVLConfig, LanguageModelConfig, ModelConfig, bind
from internvl_jax.sharding import axis_size, place_batch, replicate

SHORTEST = 16  # tokens of the smallest prompt bucket


@functools.partial(jax.jit, static_argnames=("config", "room"))
def _prefill(params: Any, ids: Any, images: Any, valid: Any, *, config: ModelConfig, room: int):
    model = bind(config, params)
    if isinstance(config, InternVLConfig):
        return model.prefill(model.vision(images), ids, config.num_queries + room)
    if isinstance(config, ChatConfig):
        return model.prefill(ids, images, room, valid=valid)
    return model.prefill(ids, room)


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def _continue(params, logits, cache, key, history, *, config: ModelConfig, decoding: Decoding):
    decode = bind(config, params).decode
    result = generate.generate(decode, logits, cache, decoding, key=key, history=history)
    return jax.tree.map(replicate, result)


def bucket(length: int) -> int:
    """The smallest of 16, 32, 64, 128, 192, 256, 320, … that holds `length` tokens."""
    if length <= 64:
        return max(SHORTEST, 1 << max(length - 1, 0).bit_length())
    return -(-length // 64) * 64


def continue_prompts(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    images: Any = None,
    seed: int = 0,
) -> Generated:
    """Continue prompts of any lengths together.

    Args:
        config, params: an InternVL-G, a chat model or a language model; under a mesh
            (`jax.set_mesh`) the parameters lie on it.
        prompts: token ids of each row, beginning token included; chat prompts with their image
            positions.
        decoding: how to choose; the ids of a prompt count as seen by the repetition penalty.
        images: of InternVL-G one per prompt, [N, H, W, 3]; of a chat model the same, or for each
            prompt an array [M, H, W, 3] of its images. Language models take none.
        seed: of the random key, where `decoding.temperature` asks for one.

    Returns:
        `Generated` with numpy arrays, one row per prompt.

    Raises:
        ValueError: no prompt or an empty one, images that do not fit the prompts or the model.
    """
    ids, valid, pixels = _padded(config, prompts, images)
    history = np.where(valid, ids, -1)
    ids, pixels, valid, history = place_batch((ids, pixels, valid, history))
    room = ids.shape[1] + bucket(decoding.max_new_tokens)
    logits, cache = _prefill(params, ids, pixels, valid, config=config, room=room)
    key = jax.random.key(seed) if decoding.temperature > 0 else None
    history = history if decoding.repetition_penalty != 1.0 else None
    result = _continue(params, logits, cache, key, history, config=config, decoding=decoding)
    return jax.tree.map(lambda a: np.asarray(a)[: len(prompts)], result)


class Sampling(NamedTuple):
    """How the tokens of one row are chosen, as `Decoding` has it; `seed` of the row's draws."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def stream(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Sampling],
    max_new_tokens: int,
    *,
    images: Any = None,
) -> Iterator[np.ndarray]:
    """Continue prompts together, yielding the next id of every row, int32 [N], step by step.

    Rows do not end by themselves: whoever reads the stream knows the stop ids, drops the rows that
    are done, and closes it. A row's ids are those that `continue_prompts` chooses for its prompt
    alone with the same settings and seed. The settings are data of the compiled program, so no
    request compiles anything because its settings are new. The other arguments are those of
    `continue_prompts`, and so are the errors.
    """
    if len(sampling) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many settings, not {len(sampling)}")
    ids, valid, pixels = _padded(config, prompts, images)
    rows = [*sampling, *[sampling[-1]] * (len(ids) - len(prompts))]
    temperature, top_p = (np.float32(column) for column in list(zip(*rows, strict=True))[:2])
    seeds = np.uint32([row.seed & 0xFFFFFFFF for row in rows])
    zeros = np.zeros(len(ids), np.int32)
    ids, valid, pixels, zeros, *settings = place_batch(
        (ids, valid, pixels, zeros, temperature, top_p, seeds)
    )
    room = ids.shape[1] + bucket(max_new_tokens)
    logits, cache = _prefill(params, ids, pixels, valid, config=config, room=room)
    token = choose(logits, zeros, *settings)
    for step in range(1, max_new_tokens):
        # The device chooses the next token while the reader looks at this one.
        following, cache = _advance(params, token, cache, np.int32(step), *settings, config=config)
        yield np.asarray(token)[: len(prompts)]
        token = following
    yield np.asarray(token)[: len(prompts)]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _advance(params, token, cache, step, temperature, top_p, seeds, *, config: ModelConfig):
    logits, cache = bind(config, params).decode(token, cache)
    steps = 0 * token + step  # laid over the mesh as the tokens are
    return choose(logits, steps, temperature, top_p, seeds), cache


@jax.jit
def choose(logits, steps, temperature, top_p, seeds) -> jax.Array:
    """Next id of each row, [B, V] → [B]: `generate`'s rule, with settings [B] that are data.

    steps: how many ids the row has chosen before, [B].
    """

    def sampled(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        descending = -jnp.sort(-scaled, axis=-1)
        share = jax.nn.softmax(descending, axis=-1)
        above = jnp.cumsum(share, axis=-1) - share
        kept = (above < top_p[:, None]) | (top_p >= 1.0)[:, None]
        lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)

        def noise(seed: jax.Array, step: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 0)
            return jax.random.gumbel(key, logits.shape[1:])

        draws = jnp.where(scaled < lowest, -jnp.inf, scaled) + jax.vmap(noise)(seeds, steps)
        return jnp.argmax(jnp.where((temperature > 0)[:, None], draws, logits), axis=-1)

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    logits = logits.astype(jnp.float32)
    chosen = jax.lax.cond(jnp.any(temperature > 0), sampled, greedy, logits)
    return chosen.astype(jnp.int32)


def _padded(
    config: ModelConfig, prompts: Sequence[Sequence[int]], images: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(ids, which of them are real, images), padded to a shape that other prompts share."""
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError("prompts are a sequence of sequences of token ids, none of them empty")
    size, length = _rows(len(rows)), bucket(max(map(len, rows)))
    ids, valid = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    for n in range(size):
        row = rows[min(n, len(rows) - 1)]  # rows beyond the last repeat it and are dropped
        ids[n, -len(row) :], valid[n, -len(row) :] = row, True
    return ids, valid, _images(config, images, len(rows), size)


def _rows(count: int) -> int:
    """Rows of the program for so many prompts: a power of two that the mesh divides."""
    mesh = jax.sharding.get_mesh()
    pieces = 1 if mesh.empty else axis_size(mesh, "batch")
    return -(-(1 << max(count - 1, 0).bit_length()) // pieces) * pieces


def _images(config: ModelConfig, images: Any, count: int, size: int) -> np.ndarray | None:
    """Images as the model's prefill takes them, filled up to `size` rows."""
    if isinstance(config, LanguageModelConfig):
        if images is not None:
            raise ValueError("a language model takes no images")
        return None
    if not isinstance(config, InternVLConfig | ChatConfig):
        raise ValueError(f"a {type(config).__name__.removesuffix('Config')} does not generate")
    if isinstance(config, InternVLConfig) and not config.num_queries:
        raise ValueError("an InternVL-C does not generate; it has no middleware")
    if images is None or len(images) != count:
        found = "none" if images is None else len(images)
        raise ValueError(f"each of the {count} prompts needs its images; there are {found}")
    groups = [np.asarray(group) for group in images]
    if isinstance(config, ChatConfig):
        groups = [group[None] if group.ndim == 3 else group for group in groups]
        # Unused features are never placed, so blank images may fill up the rows.
        most = max(len(group) for group in groups)
        groups = [
            np.concatenate([g, np.zeros((most - len(g), *g.shape[1:]), g.dtype)]) for g in groups
        ]
    stacked = np.stack(groups)
    return np.concatenate([stacked, np.repeat(stacked[-1:], size - count, axis=0)])
