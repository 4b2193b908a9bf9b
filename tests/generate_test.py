"""Generation against slower definitions: no cache, exhaustive search, known probabilities."""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import generate, sharding
from internvl_jax.decoding import Decoding
from internvl_jax.kernels import Causal
from internvl_jax.models import init
from internvl_jax.models.config import CHATS, INTERNVLS, LANGUAGE_MODELS

IMAGE_TOKEN = -200
NO_STOP = Decoding(max_new_tokens=6, stop_ids=())
PROMPTS = [[1, 7], [1, 30, 4, 9, 5], [1, 5, 8]]


@functools.cache
def _params(config):
    return init.create(config, jax.random.key(0))


def _language(vocab=40):
    tiny = LANGUAGE_MODELS["tiny"]
    return replace(tiny, llama=replace(tiny.llama, vocab_size=vocab, depth=2))


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def _continue(config, params, tokens, decoding, key=None, history=None):
    model = init.bind(config, params)
    return generate.continue_text(model, tokens, decoding, key=key, history=history)


def _text(tokens, decoding, vocab=40, **more):
    config = _language(vocab)
    tokens = jnp.asarray(tokens, jnp.int32)
    return jax.device_get(_continue(config, _params(config), tokens, decoding, **more))


def _padded(prompts, side, length=5):
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[slice(-len(prompt), None) if side == "left" else slice(len(prompt))] = prompt
    return rows


@functools.partial(jax.jit, static_argnames="config")
def _last_logits(config, params, tokens, last):
    llama = init.bind(config, params).llama
    logits = llama.logits(llama(llama.embed_tokens(tokens), mask=Causal()))
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]


def _next_logits(texts, vocab=40, length=11):
    """Logits after whole texts, without any cache; an id 0 that was generated counts."""
    tokens, config = _padded(texts, "right", length), _language(vocab)
    last = np.array([len(text) - 1 for text in texts])
    return np.asarray(_last_logits(config, _params(config), tokens, last))


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_is_the_argmax_after_each_whole_text(side):
    result = _text(_padded(PROMPTS, side), NO_STOP)
    texts, log_prob = [list(prompt) for prompt in PROMPTS], np.zeros(3)
    for _ in range(6):
        logits = _next_logits(texts)
        chosen = np.argmax(logits, axis=-1)
        log_prob += np.asarray(jax.nn.log_softmax(logits))[np.arange(3), chosen]
        texts = [[*text, int(token)] for text, token in zip(texts, chosen, strict=True)]
    for row, prompt in enumerate(PROMPTS):
        assert result.ids[row, 0].tolist() == texts[row][len(prompt) :]
    assert len(np.unique(result.ids)) > 4
    np.testing.assert_allclose(result.score[:, 0], log_prob / 6, atol=1e-5)
    assert result.length.tolist() == [[6], [6], [6]]


def test_beams_of_padded_prompts_are_those_of_a_prompt_alone():
    decoding = replace(NO_STOP, num_beams=3, num_return_sequences=3)
    left, right = (_text(_padded(PROMPTS, side), decoding) for side in ("left", "right"))
    alone = _text([PROMPTS[2]], decoding)
    for together in (left, right):
        assert np.array_equal(together.ids[2], alone.ids[0])
        np.testing.assert_allclose(together.score[2], alone.score[0], atol=1e-5)
    assert np.array_equal(left.ids, right.ids)


def test_captions_equal_prefills_of_the_growing_text():
    config = INTERNVLS["tiny"]
    params = _params(config)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    prompt = np.array([[1, 8, 30], [1, 77, 5]], np.int32)
    run = jax.jit(lambda p, x, ids: generate.caption(init.bind(config, p), x, ids, NO_STOP))
    ids = np.asarray(run(params, pixels, prompt).ids[:, 0])

    @jax.jit
    def from_the_start(params, pixels, text):
        model = init.bind(config, params)
        return jnp.argmax(model.prefill(model.vision(pixels), text, 40)[0], axis=-1)

    for step in range(6):
        text = np.concatenate([prompt, ids[:, :step]], axis=1)
        text = np.pad(text, ((0, 0), (6 - step, 0)))
        assert np.array_equal(from_the_start(params, pixels, text), ids[:, step])
    other = np.asarray(run(params, 255 - pixels, prompt).ids[:, 0])
    assert not np.array_equal(ids, other)  # the image is looked at


def test_answers_equal_passes_over_the_growing_chat():
    config = CHATS["tiny"]
    params = _params(config)
    images = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    picture = [IMAGE_TOKEN] * config.tokens_per_image
    prompt = np.array([[1, *picture, 9, 30], [1, *picture, 6, 11]], np.int32)
    run = jax.jit(lambda p, t, x: generate.answer(init.bind(config, p), t, x, NO_STOP))
    ids = np.asarray(run(params, prompt, images).ids[:, 0])
    whole = jax.jit(lambda p, t, x: init.bind(config, p)(t, x))
    text = np.concatenate([prompt, ids], axis=1)
    logits = whole(params, text, images)[:, prompt.shape[1] - 1 : -1]
    assert np.array_equal(jnp.argmax(logits, axis=-1), ids)


@pytest.mark.parametrize(("penalty", "min_new_tokens"), [(1.0, 0), (0.0, 2), (-1.0, 0)])
def test_wide_beams_find_the_best_of_all_continuations(penalty, min_new_tokens):
    prompt, stop, limit = [1, 4], 2, 3
    decoding = Decoding(
        max_new_tokens=limit,
        min_new_tokens=min_new_tokens,
        num_beams=30,  # more than the 5² open continuations before the last step
        num_return_sequences=8,
        length_penalty=penalty,
        stop_ids=(stop,),
    )
    result = _text([prompt], decoding, vocab=6)
    texts = [t for length in range(limit) for t in itertools.product(range(6), repeat=length)]
    logits = _next_logits([[*prompt, *text] for text in texts], vocab=6)
    log_probs = dict(zip(texts, np.asarray(jax.nn.log_softmax(logits)), strict=True))
    every = {}
    for length in range(1, limit + 1):
        for text in itertools.product(range(6), repeat=length):
            ended = text[-1] == stop
            if stop in text[:-1] or not (ended or length == limit):
                continue
            if ended and length <= min_new_tokens:
                continue
            total = sum(log_probs[text[:i]][text[i]] for i in range(length))
            every[text] = total / length**penalty
    best = sorted(every, key=every.get, reverse=True)[:8]
    for row, text in enumerate(best):
        assert result.length[0, row] == len(text)
        assert tuple(result.ids[0, row, : len(text)].tolist()) == text
        assert result.score[0, row] == pytest.approx(every[text], abs=1e-5, rel=1e-6)
        assert not result.ids[0, row, len(text) :].any()


def test_early_stopping_gives_up_better_beams():
    prompts = [[1, n] for n in range(3, 35)]
    settings = Decoding(max_new_tokens=8, num_beams=3, stop_ids=tuple(range(3, 12)))
    early, never = (
        _text(prompts, replace(settings, early_stopping=rule)).score[:, 0]
        for rule in (True, "never")
    )
    assert np.all(never >= early - 1e-6)
    assert np.any(never > early + 1e-4)


def test_rows_end_at_any_stop_id_and_keep_the_logits_that_chose():
    prompts, stops = [[1, n] for n in range(3, 35)], (4, 5, 6, 7, 8, 9)
    decoding = Decoding(
        max_new_tokens=7, min_new_tokens=2, stop_ids=stops, pad_id=39, keep_logits=True
    )
    result = _text(prompts, decoding)
    lengths = result.length[:, 0]
    assert 2 < lengths.min() < 7
    for ids, length, logits in zip(result.ids[:, 0], lengths, result.logits, strict=True):
        assert not np.isin(ids[: length - 1], stops).any()
        assert ids[length - 1] in stops or length == 7
        assert np.all(ids[length:] == 39)
        assert np.array_equal(np.argmax(logits[:length], axis=-1), ids[:length])
        assert not np.any(logits[length:])


def test_beams_end_at_any_stop_id():
    prompts, stops = [[1, n] for n in range(3, 35)], (4, 5, 6, 7, 8, 9)
    decoding = Decoding(max_new_tokens=7, num_beams=3, stop_ids=stops, pad_id=39)
    result = _text(prompts, decoding)
    assert result.length.min() < 7
    for ids, length in zip(result.ids[:, 0], result.length[:, 0], strict=True):
        assert not np.isin(ids[: length - 1], stops).any()
        assert ids[length - 1] in stops or length == 7
        assert np.all(ids[length:] == 39)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_repetition_penalty_forbids_what_was_seen(num_beams):
    decoding = replace(NO_STOP, repetition_penalty=1e6, max_new_tokens=8, num_beams=num_beams)
    free = _text([[1, 7]], decoding, history=jnp.full((1, 4), -1)).ids[0, 0].tolist()
    assert len(set(free)) == 8
    again = _text([[1, 7]], decoding, history=jnp.asarray([free[:4]])).ids[0, 0].tolist()
    assert len(set(again)) == 8 and not set(again) & set(free[:4])


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=2.5), dict(temperature=2.0, top_k=3), dict(temperature=2.0, top_p=0.7)],
)
def test_samples_have_the_right_frequencies(settings):
    rows = 4000
    decoding = Decoding(max_new_tokens=1, stop_ids=(), **settings)
    ids = _text([[1, 4]] * rows, decoding, vocab=6, key=jax.random.key(3)).ids
    share = np.bincount(ids.ravel(), minlength=6) / rows
    wanted = np.exp(_next_logits([[1, 4]], vocab=6)[0] / settings["temperature"])
    wanted /= wanted.sum()
    order = np.argsort(-wanted)
    count = settings.get("top_k", 6)
    if "top_p" in settings:
        count = int(np.searchsorted(np.cumsum(wanted[order]), settings["top_p"])) + 1
    wanted[order[count:]] = 0
    np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.03)
    assert np.all(share[order[count:]] == 0)


def test_a_seed_fixes_the_sample_whatever_stands_beside_it():
    decoding = replace(NO_STOP, temperature=1.5)
    first = _text([[1, 7], [1, 30], [1, 5]], decoding, key=jax.random.key(1))
    other_row = _text([[1, 7], [1, 30], [1, 6]], decoding, key=jax.random.key(1))
    other_key = _text([[1, 7], [1, 30], [1, 5]], decoding, key=jax.random.key(2))
    assert np.array_equal(first.ids[:2], other_row.ids[:2])
    assert not np.array_equal(first.ids, other_key.ids)


def test_a_mesh_changes_nothing():
    config, decoding = INTERNVLS["tiny"], replace(NO_STOP, num_beams=2, max_new_tokens=3)
    params = jax.tree.map(np.asarray, _params(config))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    prompt = np.array([[1, 8, 30]] * 4, np.int32)

    def run(params, pixels, ids):
        return generate.caption(init.bind(config, params), pixels, ids, decoding)

    alone = jax.device_get(jax.jit(run)(params, pixels, prompt))
    # Two devices: the threads of more would spend minutes waiting for one another on two cores.
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, init.shardings(config, mesh))
        batch = jax.device_put((pixels, prompt), sharding.batch_sharding(mesh))
        sharded = jax.device_get(jax.jit(run)(placed, *batch))
    assert np.array_equal(sharded.ids, alone.ids)
    np.testing.assert_allclose(sharded.score, alone.score, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(num_beams=2, num_return_sequences=3), "num_return_sequences=3"),
        (dict(num_beams=2, temperature=1.0), "does not sample"),
        (dict(top_p=0.0), "top_p"),
        (dict(early_stopping="soon"), "early_stopping='soon'"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_sampling_needs_a_key():
    with pytest.raises(ValueError, match="random key"):
        _text([[1, 7]], replace(NO_STOP, temperature=1.0))
