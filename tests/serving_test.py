"""Prompts of any lengths together, in few compiled programs."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from internvl_jax import generate, serving
from internvl_jax.decoding import Decoding
from internvl_jax.models import bind
from internvl_jax.models.config import INTERNVLS, LANGUAGE_MODELS
from internvl_jax.models.init import abstract
from internvl_jax.rules import flatten, unflatten

TINY = LANGUAGE_MODELS["tiny"]
CONFIG = replace(TINY, llama=replace(TINY.llama, vocab_size=40, depth=2))
GREEDY = Decoding(max_new_tokens=5, stop_ids=())
PROMPTS = [[1, 7], [1, 30, 4, 9, 5], [1, 5, 8]]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = flatten(abstract(CONFIG))
    tree = {p: 0.3 * rng.standard_normal(s.shape, np.float32) for p, s in shapes.items()}
    return jax.tree.map(jax.numpy.asarray, unflatten(tree))


@functools.partial(jax.jit, static_argnames="decoding")
def alone(params, prompt, decoding):
    return generate.continue_text(bind(CONFIG, params), prompt, decoding, history=prompt)


@pytest.mark.parametrize(
    "decoding",
    [
        GREEDY,
        replace(GREEDY, num_beams=3, num_return_sequences=2),
        replace(GREEDY, repetition_penalty=5.0),
    ],
)
def test_each_row_is_what_its_prompt_gives_alone(params, decoding):
    result = serving.continue_prompts(CONFIG, params, PROMPTS, decoding)
    assert result.ids.shape == (3, decoding.num_return_sequences, 5)
    for row, prompt in enumerate(PROMPTS):
        expected = alone(params, np.int32([prompt]), decoding)
        assert np.array_equal(result.ids[row], expected.ids[0])
        np.testing.assert_allclose(result.score[row], expected.score[0], atol=1e-5)


def test_one_program_per_bucket_and_no_new_prefill_for_other_settings(params):
    serving.continue_prompts(CONFIG, params, PROMPTS, GREEDY)
    read, told = serving._prefill._cache_size(), serving._continue._cache_size()
    for prompts in (PROMPTS[::-1], [[1] * 16, [1, 2], [3]], [*PROMPTS, [1, 2, 3]]):
        serving.continue_prompts(CONFIG, params, prompts, GREEDY)
    assert (serving._prefill._cache_size(), serving._continue._cache_size()) == (read, told)
    sampled = replace(GREEDY, temperature=1.0, top_p=0.9, top_k=5)
    serving.continue_prompts(CONFIG, params, PROMPTS, sampled)
    assert (serving._prefill._cache_size(), serving._continue._cache_size()) == (read, told + 1)
    serving.continue_prompts(CONFIG, params, [[1] * 17], GREEDY)
    assert serving._prefill._cache_size() == read + 1


def test_a_seed_fixes_the_sample(params):
    sampled = replace(GREEDY, temperature=2.0)
    first, same, other = (
        serving.continue_prompts(CONFIG, params, PROMPTS, sampled, seed=seed).ids
        for seed in (3, 3, 4)
    )
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_rows_stop_at_stop_ids(params):
    free = serving.continue_prompts(CONFIG, params, PROMPTS, GREEDY).ids[:, 0]
    stop = int(free[0, 1])
    ended = serving.continue_prompts(CONFIG, params, PROMPTS, replace(GREEDY, stop_ids=(stop,)))
    assert ended.length[0, 0] <= 2
    for row, length in zip(ended.ids[:, 0], ended.length[:, 0], strict=True):
        assert length == 5 or row[length - 1] == stop
        assert not row[length:].any()


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_buckets(length, size):
    assert serving.bucket(length) == size


@pytest.mark.parametrize(
    ("config", "prompts", "images", "message"),
    [
        (CONFIG, [], None, "none of them empty"),
        (CONFIG, [[1], []], None, "none of them empty"),
        (CONFIG, [[1]], np.zeros((1, 32, 32, 3)), "takes no images"),
        (INTERNVLS["tiny"], [[1]], None, "there are none"),
        (INTERNVLS["tiny"], [[1]], np.zeros((2, 32, 32, 3)), "there are 2"),
        (replace(INTERNVLS["tiny"], num_queries=0), [[1]], None, "no middleware"),
    ],
)
def test_what_does_not_fit_is_said(config, prompts, images, message):
    with pytest.raises(ValueError, match=message):
        serving.continue_prompts(config, {}, prompts, GREEDY, images=images)


def streamed(params, prompts, sampling, steps=5):
    return np.stack(list(serving.stream(CONFIG, params, prompts, sampling, steps)), axis=1)


def test_a_stream_gives_each_row_what_its_settings_give_alone(params):
    rows = [(0.0, 1.0, 0), (2.0, 1.0, 3), (1.5, 0.7, 9)]
    ids = streamed(params, PROMPTS, [serving.Sampling(*row) for row in rows])
    for row, (temperature, top_p, seed) in enumerate(rows):
        decoding = replace(GREEDY, temperature=temperature, top_p=top_p)
        alone = serving.continue_prompts(CONFIG, params, [PROMPTS[row]], decoding, seed=seed)
        assert np.array_equal(ids[row], alone.ids[0, 0])


def test_new_settings_of_a_stream_compile_nothing(params):
    streamed(params, PROMPTS, [serving.Sampling()] * 3)
    programs = serving._advance._cache_size(), serving.choose._cache_size()
    streamed(params, PROMPTS[::-1], [serving.Sampling(0.3 * n, 0.8, n) for n in range(3)])
    assert (serving._advance._cache_size(), serving.choose._cache_size()) == programs
    with pytest.raises(ValueError, match="3 prompts need as many settings, not 1"):
        streamed(params, PROMPTS, [serving.Sampling()])
