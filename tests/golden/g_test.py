"""G: captions by greedy and beam search, token for token, with their scores and logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import generate
from internvl_jax.decoding import Decoding
from internvl_jax.models import bind
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("G"))
def test_generation(case, tmp_path):
    config, params = case.load(tmp_path)
    compare = cases.Comparison(case)
    prompt = case.inputs("input_ids") * case.inputs("attention_mask")
    left = case.inputs("input_ids_left") * case.inputs("mask_left")
    runs = [(name, settings, prompt) for name, settings in case.info["generate_settings"].items()]
    for name in compare.names(""):
        # Left-padded prompts are recorded under the name of their settings.
        if name.endswith("_leftpad"):
            settings = case.info["generate_settings"][name.removesuffix("_leftpad")]
            runs.append((name, settings, left))
    for name, settings, ids in runs:
        result = run(case, config, params, ids, settings)
        check(compare, name, result)
    compare.done()


def run(case, config, params, ids, settings):
    text = case.config["qllama_config"]
    decoding = Decoding(
        max_new_tokens=int(re.search(r"max_new_tokens=(\d+)", case.info["call"])[1]),
        stop_ids=(text["eos_token_id"],),
        pad_id=text["pad_token_id"],
        keep_logits=settings.get("num_beams", 1) == 1,
        **settings,
    )

    @jax.jit
    def caption(params, pixels, ids):
        # The recorded program starts every row with this id, which the model never reads.
        history = jnp.full((ids.shape[0], 1), text["bos_token_id"])
        return generate.caption(bind(config, params), pixels, ids, decoding, history=history)

    return caption(params, case.pixels("pixel_values"), ids)


def check(compare, name, result):
    expected = compare.expected(name)[:, 1:]  # without that first id
    ids = np.asarray(result.ids).reshape(-1, result.ids.shape[-1])
    assert np.array_equal(ids[:, : expected.shape[1]], expected), name
    assert not ids[:, expected.shape[1] :].any(), name
    if f"{name}_score" in compare:
        # Two units in the last place for scores in the hundreds (length penalty -1).
        score = np.asarray(result.score).reshape(-1)
        expected = compare.expected(f"{name}_score")
        np.testing.assert_allclose(score, expected, atol=cases.ABSOLUTE, rtol=2.4e-7, err_msg=name)
    if f"{name}_step_logits" in compare:
        expected = compare.expected(f"{name}_step_logits")
        steps = expected.shape[1]
        inside = np.arange(steps) < np.asarray(result.length)  # [B, steps]
        logits = np.asarray(result.logits)[:, :steps]
        np.testing.assert_allclose(
            logits[inside], expected[inside], atol=cases.ABSOLUTE, rtol=0, err_msg=name
        )
