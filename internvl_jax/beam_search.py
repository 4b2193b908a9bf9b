"""Beam search by the rules of transformers 4.37.2, with which the published captions were made.

Each step looks at the max(2, 1 + stop ids) × beams best continuations of a row. One that ends
counts as finished only if it ranks among the best `num_beams`; its score is
sum log p / length^length_penalty, the stop id included. The best `num_beams` that do not end go on.
A row is done when it has `num_beams` finished ones and no open one is expected to beat the worst.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax.decoding import Decode, Decoding, Generated, full, is_stop, penalise, seen_ids
from internvl_jax.models.llama import Cache

# Log-probability of the beams that do not exist yet in the first step: they start as copies of one
# prompt, and without this every beam would choose the same token.
_ABSENT = -1e9


def _gather(array: jax.Array, index: jax.Array) -> jax.Array:
    """array [B, S, ...] at index [B, K] along axis 1 → [B, K, ...]."""
    index = index.reshape(index.shape + (1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


class _Beams(NamedTuple):
    """State between two steps of beam search; K beams per row, both groups best first."""

    step: jax.Array
    token: jax.Array  # [B, K] last token of each open beam
    parent: jax.Array  # [B, K] beam whose cache it continues
    ids: jax.Array  # [B, K, T]
    log_prob: jax.Array  # [B, K]
    finished_ids: jax.Array  # [B, K, T]
    finished_length: jax.Array  # [B, K]; 0 = no such beam yet
    finished_score: jax.Array  # [B, K]
    done: jax.Array  # [B]
    seen: jax.Array | None  # [B, K, V]


def _finish(
    beams: _Beams, ids: jax.Array, length: jax.Array, score: jax.Array, valid: jax.Array
) -> _Beams:
    """Keep the best K of the finished beams and these new ones (ids [B, C, T], rest [B, C])."""
    valid &= ~beams.done[:, None] & (score > -jnp.inf)
    score = jnp.concatenate([beams.finished_score, jnp.where(valid, score, -jnp.inf)], axis=1)
    length = jnp.concatenate([beams.finished_length, jnp.where(valid, length, 0)], axis=1)
    ids = jnp.concatenate([beams.finished_ids, ids], axis=1)
    best, index = jax.lax.top_k(score, beams.finished_score.shape[1])
    return beams._replace(
        finished_ids=_gather(ids, index),
        finished_length=_gather(length, index),
        finished_score=best,
    )


def beam_search(
    decode: Decode,
    logits: jax.Array,
    cache: Cache,
    decoding: Decoding,
    history: jax.Array | None = None,
) -> Generated:
    """Continue prompts by beam search; arguments as of `generate.generate`."""
    batch, vocab = logits.shape
    width, limit = decoding.num_beams, decoding.max_new_tokens
    candidates = min(max(2, 1 + len(decoding.stop_ids)) * width, width * vocab)
    penalty = decoding.length_penalty

    def advance(logits: jax.Array, beams: _Beams) -> _Beams:
        scores = jax.nn.log_softmax(logits.astype(jnp.float32).reshape(batch, width, vocab))
        scores = penalise(scores, beams.seen, beams.step, decoding)
        total = (beams.log_prob[..., None] + scores).reshape(batch, width * vocab)
        log_prob, flat = jax.lax.top_k(total, candidates)  # [B, C], best first
        parent, token = flat // vocab, flat % vocab
        ids = _gather(beams.ids, parent)
        ids = jnp.where(jnp.arange(limit) == beams.step, token[..., None], ids)
        length = beams.step + 1
        stop = is_stop(token, decoding)

        # Only the best K candidates may finish.
        top = slice(None, width)
        ranked = log_prob * length.astype(jnp.float32) ** -penalty
        ended = _finish(
            beams, ids[:, top], jnp.full_like(token[:, top], length), ranked[:, top], stop[:, top]
        )
        full = jnp.all(ended.finished_length > 0, axis=1)
        worst = ended.finished_score[:, -1]
        if decoding.early_stopping is True:
            hopeless = jnp.ones_like(full)
        elif decoding.early_stopping == "never" and penalty > 0:
            hopeless = worst >= log_prob[:, 0] * limit**-penalty
        else:
            hopeless = worst >= ranked[:, 0]

        # The first K candidates that do not end go on.
        order = jnp.argsort(stop, axis=1, stable=True)[:, :width]
        log_prob = jnp.where(stop, -jnp.inf, log_prob)
        parent, token = _gather(parent, order), _gather(token, order).astype(jnp.int32)
        seen = beams.seen
        if seen is not None:
            seen = _gather(seen, parent) | jax.nn.one_hot(token, vocab, dtype=bool)
        return ended._replace(
            step=length,
            token=token,
            parent=parent,
            ids=_gather(ids, order),
            log_prob=_gather(log_prob, order),
            done=beams.done | (full & hopeless),
            seen=seen,
        )

    def rows(parent: jax.Array) -> jax.Array:
        return (jnp.arange(batch)[:, None] * width + parent).reshape(-1)

    def one_more(state):
        cache, beams = state
        cache = cache.take(rows(beams.parent))
        logits, cache = decode(beams.token.reshape(-1), cache)
        return cache, advance(logits, beams)

    copies = jnp.repeat(jnp.arange(batch), width)
    seen = seen_ids(history, logits, decoding)
    first = _Beams(
        step=jnp.int32(0),
        token=full((batch, width), 0, jnp.int32),
        parent=full((batch, width), 0, jnp.int32),
        ids=full((batch, width, limit), decoding.pad_id, jnp.int32),
        log_prob=full((batch, width), 0.0, jnp.float32)
        + jnp.where(jnp.arange(width) > 0, _ABSENT, 0.0),
        finished_ids=full((batch, width, limit), decoding.pad_id, jnp.int32),
        finished_length=full((batch, width), 0, jnp.int32),
        finished_score=full((batch, width), -jnp.inf, jnp.float32),
        done=full((batch,), False, bool),
        seen=None if seen is None else jnp.repeat(seen[:, None], width, axis=1),
    )
    beams = advance(jnp.repeat(logits[:, None], width, axis=1), first)
    _, beams = jax.lax.while_loop(
        lambda state: (state[1].step < limit) & ~jnp.all(state[1].done),
        one_more,
        (cache.take(copies), beams),
    )
    # Beams still open at the limit compete with the finished ones, at the full length.
    score = beams.log_prob * beams.step.astype(jnp.float32) ** -penalty
    length = jnp.full_like(beams.token, beams.step)
    beams = _finish(beams, beams.ids, length, score, jnp.ones_like(length, bool))
    kept = slice(None, decoding.num_return_sequences)
    return Generated(
        beams.finished_ids[:, kept], beams.finished_length[:, kept], beams.finished_score[:, kept]
    )
