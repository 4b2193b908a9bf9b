"""Text generation with a key/value cache: greedy, sampled, and by beam search.

`generate` knows a model only as the logits and cache that its prefill returned, and its
`decode(token, cache) -> (logits, cache)` for one more token per row; `caption`, `answer` and
`continue_text` do the prefill of the three kinds of model. All tokens come out of one
`jax.lax.while_loop`, so a caller's `jax.jit` compiles once per shape.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from internvl_jax.beam_search import beam_search
from internvl_jax.decoding import Decode, Decoding, Generated, full, is_stop, penalise, seen_ids
from internvl_jax.models.chat import Chat, LanguageModel
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.llama import Cache


def caption(
    model: InternVL,
    pixels: jax.Array,
    ids: jax.Array,
    decoding: Decoding,
    *,
    key: jax.Array | None = None,
    history: jax.Array | None = None,
) -> Generated:
    """Describe images [B, H, W, 3] with the middleware, after prompts ids [B, T] without end token.

    Prompts may be padded with 0 on either side; see `generate` for the rest.
    """
    room = model.config.num_queries + ids.shape[1] + decoding.max_new_tokens
    logits, cache = model.prefill(model.vision(pixels), ids, room)
    return generate(model.decode, logits, cache, decoding, key=key, history=history)


def answer(
    model: Chat,
    tokens: jax.Array,
    images: jax.Array,
    decoding: Decoding,
    *,
    valid: jax.Array | None = None,
    key: jax.Array | None = None,
    history: jax.Array | None = None,
) -> Generated:
    """Answer chat prompts [B, T] about images [B, M, H, W, 3]; prompts padded as above.

    valid: bool [B, T], for vocabularies in which 0 is a word; None: padding is the id 0.
    """
    room = tokens.shape[1] + decoding.max_new_tokens
    logits, cache = model.prefill(tokens, images, room, valid=valid)
    return generate(model.decode, logits, cache, decoding, key=key, history=history)


def continue_text(
    model: LanguageModel,
    tokens: jax.Array,
    decoding: Decoding,
    *,
    key: jax.Array | None = None,
    history: jax.Array | None = None,
) -> Generated:
    """Continue texts [B, T] padded with 0 as above."""
    logits, cache = model.prefill(tokens, tokens.shape[1] + decoding.max_new_tokens)
    return generate(model.decode, logits, cache, decoding, key=key, history=history)


def generate(
    decode: Decode,
    logits: jax.Array,
    cache: Cache,
    decoding: Decoding,
    *,
    key: jax.Array | None = None,
    history: jax.Array | None = None,
) -> Generated:
    """Continue prompts that a model has already read. Call it inside `jax.jit`.

    Args:
        decode: one step of the model, (token [N] int32, cache) → (logits [N, V], cache).
        logits: [B, V], the model's prediction after each prompt.
        cache: the model's cache after the prompts, with room for `max_new_tokens` more.
        decoding: how to choose.
        key: random key, needed when `decoding.temperature` > 0.
        history: [B, P] ids before the continuation, which only the repetition penalty looks at;
            negative entries are ignored.

    Raises:
        ValueError: sampling without a key.
    """
    if decoding.num_beams > 1:
        return beam_search(decode, logits, cache, decoding, history)
    if decoding.temperature > 0 and key is None:
        raise ValueError("sampling (temperature > 0) needs a random key")
    return _token_by_token(decode, logits, cache, decoding, key, history)


def _sample(logits: jax.Array, decoding: Decoding, key: jax.Array) -> jax.Array:
    """Draw one id per row, [B, V] → [B]: temperature, then top-k, then top-p."""
    logits = logits / decoding.temperature
    if 0 < decoding.top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, decoding.top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if decoding.top_p < 1.0:
        descending = -jnp.sort(-logits, axis=-1)
        share = jax.nn.softmax(descending, axis=-1)
        # An id stays while the probability strictly above it is below top_p: the best always does.
        above = jnp.cumsum(share, axis=-1) - share
        lowest = jnp.min(jnp.where(above < decoding.top_p, descending, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    # A key per row: a row's draw does not depend on how many rows stand beside it. The largest of
    # logits plus Gumbel noise is a draw from their softmax.
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1)


class _Rows(NamedTuple):
    """State between two steps of token-by-token generation."""

    step: jax.Array
    token: jax.Array  # [B]
    ids: jax.Array  # [B, T]
    log_prob: jax.Array  # [B]
    length: jax.Array  # [B]
    done: jax.Array  # [B]
    seen: jax.Array | None  # [B, V]
    logits: jax.Array | None  # [B, T, V]


def _token_by_token(decode, logits, cache, decoding, key, history) -> Generated:
    batch, vocab = logits.shape
    limit = decoding.max_new_tokens

    def advance(logits: jax.Array, rows: _Rows) -> _Rows:
        scores = penalise(logits.astype(jnp.float32), rows.seen, rows.step, decoding)
        if decoding.temperature > 0:
            chosen = _sample(scores, decoding, jax.random.fold_in(key, rows.step))
        else:
            chosen = jnp.argmax(scores, axis=-1)
        one_hot = jax.nn.one_hot(chosen, vocab, dtype=bool)
        log_prob = jnp.sum(jnp.where(one_hot, jax.nn.log_softmax(scores), 0.0), axis=-1)
        token = jnp.where(rows.done, decoding.pad_id, chosen).astype(jnp.int32)
        here = jnp.arange(limit) == rows.step
        kept = rows.logits
        if kept is not None:
            kept = jnp.where((here & ~rows.done[:, None])[..., None], scores[:, None], kept)
        return _Rows(
            step=rows.step + 1,
            token=token,
            ids=jnp.where(here, token[:, None], rows.ids),
            log_prob=rows.log_prob + jnp.where(rows.done, 0.0, log_prob),
            length=rows.length + ~rows.done,
            done=rows.done | is_stop(token, decoding),
            seen=None if rows.seen is None else rows.seen | one_hot,
            logits=kept,
        )

    def one_more(state):
        cache, rows = state
        logits, cache = decode(rows.token, cache)
        return cache, advance(logits, rows)

    first = _Rows(
        step=jnp.int32(0),
        token=full((batch,), 0, jnp.int32),
        ids=full((batch, limit), decoding.pad_id, jnp.int32),
        log_prob=full((batch,), 0.0, jnp.float32),
        length=full((batch,), 0, jnp.int32),
        done=full((batch,), False, bool),
        seen=seen_ids(history, logits, decoding),
        logits=full((batch, limit, vocab), 0.0, jnp.float32) if decoding.keep_logits else None,
    )
    _, rows = jax.lax.while_loop(
        lambda state: (state[1].step < limit) & ~jnp.all(state[1].done),
        one_more,
        (cache, advance(logits, first)),
    )
    score = rows.log_prob / rows.length.astype(jnp.float32) ** decoding.length_penalty
    return Generated(rows.ids[:, None], rows.length[:, None], score[:, None], rows.logits)
