"""How tokens are chosen: the settings, the result, and the penalties all searches share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax.models.llama import Cache
from internvl_jax.sharding import spec

Decode = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]


@dataclass(frozen=True)
class Decoding:
    """How to choose tokens.

    Attributes:
        max_new_tokens: length limit, the stop id included.
        min_new_tokens: no stop id before so many tokens.
        num_beams: 1 chooses token by token, more searches.
        num_return_sequences: beams returned per row, best first.
        length_penalty: exponent of the length that divides a beam's log-probability.
        early_stopping: True ends a row at `num_beams` finished beams; False when no open beam can
            win at its present length; "never" when none could at any length.
        repetition_penalty: logits of ids already seen are divided (if positive) or multiplied
            (if negative) by it; in beam search the log-probabilities are.
        temperature: 0 takes the most likely token; above, tokens are sampled (one beam only).
        top_k: sample among so many most likely ids; 0 for all.
        top_p: sample among the fewest ids that together hold this probability.
        stop_ids: ids that end a row; each is kept in the output.
        pad_id: fills a row after its end.
        keep_logits: return the logits of every step (one beam only).
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = (2,)
    pad_id: int = 0
    keep_logits: bool = False

    def __post_init__(self):
        problems = [
            (self.max_new_tokens < 1, "max_new_tokens must be at least 1"),
            (self.num_beams < 1, "num_beams must be at least 1"),
            (
                not 1 <= self.num_return_sequences <= self.num_beams,
                f"num_return_sequences={self.num_return_sequences} must lie between 1 and "
                f"num_beams={self.num_beams}",
            ),
            (self.temperature < 0, "temperature must not be negative"),
            (
                self.temperature > 0 and self.num_beams > 1,
                "beam search does not sample: set temperature=0 or num_beams=1",
            ),
            (not 0 < self.top_p <= 1, "top_p must lie in (0, 1]"),
            (self.repetition_penalty <= 0, "repetition_penalty must be positive"),
            (
                self.early_stopping not in (True, False, "never"),
                f"early_stopping={self.early_stopping!r} must be True, False or 'never'",
            ),
            (self.keep_logits and self.num_beams > 1, "keep_logits needs num_beams=1"),
        ]
        wrong = [message for bad, message in problems if bad]
        if wrong:
            raise ValueError("; ".join(wrong))


class Generated(NamedTuple):
    """What `generate` returns; R = num_return_sequences, T = max_new_tokens.

    Attributes:
        ids: [B, R, T] int32, stop id included, then `pad_id`.
        length: [B, R] int32, number of ids before the padding.
        score: [B, R] float32, sum of log-probabilities / length^length_penalty.
        logits: [B, T, V] float32 after the penalties, zeros after the end, or None.
    """

    ids: jax.Array
    length: jax.Array
    score: jax.Array
    logits: jax.Array | None = None


def is_stop(token: jax.Array, decoding: Decoding) -> jax.Array:
    """Which ids end a row, bool of the same shape."""
    stop = jnp.zeros(token.shape, bool)
    for stop_id in decoding.stop_ids:
        stop |= token == stop_id
    return stop


def seen_ids(history: jax.Array | None, logits: jax.Array, decoding: Decoding) -> jax.Array | None:
    """[B, V] marks of the ids in `history`; None where no penalty asks for them."""
    if decoding.repetition_penalty == 1.0:
        return None
    if history is None:
        return jnp.zeros_like(logits, bool)
    return jax.nn.one_hot(history, logits.shape[-1], dtype=bool).any(axis=1)


def penalise(
    scores: jax.Array, seen: jax.Array | None, step: jax.Array, decoding: Decoding
) -> jax.Array:
    """Repetition penalty, then no stop id before `min_new_tokens`; scores are [..., V]."""
    if seen is not None:
        factor = decoding.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * factor, scores / factor), scores)
    if decoding.min_new_tokens:
        stop = is_stop(jnp.arange(scores.shape[-1]), decoding)
        scores = jnp.where(stop & (step < decoding.min_new_tokens), -jnp.inf, scores)
    return scores


def full(shape: tuple[int, ...], value: Any, dtype: Any) -> jax.Array:
    """A constant array whose leading axis is the batch."""
    return jnp.full(shape, value, dtype, out_sharding=spec("batch", *[None] * (len(shape) - 1)))
