"""C: image and text features and similarities of InternVL-C and InternVL-G, also with adapters."""

import functools

import jax
import numpy as np
import pytest

from internvl_jax.models import bind, lora
from internvl_jax.rules import flatten
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("C"))
def test_features(case, tmp_path):
    config, params = case.load(tmp_path)
    compare = cases.Comparison(case)
    compare_all(config, params, case, compare, "")
    if "weights_merged.safetensors" in case.info["files"]:
        merged_config, expected = case.load(tmp_path / "merged", "weights_merged.safetensors")
        compare_all(merged_config, expected, case, compare, "_merged")
        merged, expected = flatten(lora.merged(params)), flatten(expected)
        assert merged.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_allclose(
                merged[path], array, rtol=0, atol=cases.ABSOLUTE, err_msg=path
            )
    compare.done()


def compare_all(config, params, case, compare, suffix):
    """Every recorded output whose name ends in `suffix`."""
    results = outputs(config)(params, case.pixels("image"), case.inputs("text"))
    encode = encoder(config)
    np.testing.assert_allclose(
        encode(params, case.inputs("text")), results["text_embeds"], rtol=0, atol=cases.ABSOLUTE
    )
    if "in.text_hole" in case.tensors:
        results["text_embeds_hole"] = encode(params, case.inputs("text_hole"))
    for name in compare.names(""):
        if suffix or not name.endswith("_merged"):
            valid = case.inputs("text") > 0 if name == "text_hidden" else None
            compare.close(name, results[name.removesuffix(suffix)], valid)


@functools.cache
def encoder(config):
    return jax.jit(lambda params, ids: bind(config, params).encode_text(ids))


@functools.cache
def outputs(config):
    """A compiled function from parameters and inputs to {name of a recorded output: ours}."""

    @jax.jit
    def run(params, pixels, ids):
        model = bind(config, params)
        vision = model.vision(pixels)
        queries = model.query_outputs(vision)
        states = model.text_states(ids)
        results = {
            "backbone": vision,
            "query_out": queries,
            "clip_projector": model.pool(vision),
            "clip_projector2": model.pool2(queries),
            "text_hidden": states,
            "text_embeds": model.project_text(states, ids > 0),
        }
        for mode in ("c", "g"):
            image = model.encode_image(pixels, mode)
            logits = model.similarity(image, results["text_embeds"])
            results[f"image_embeds_{mode}"] = image
            results[f"logits_per_image_{mode}"] = logits
            results[f"logits_per_text_{mode}"] = logits.T
        return results

    return run
