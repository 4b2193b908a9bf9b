"""Planned calls of inference; checked on this machine's devices instead of a pod's."""

import jax
import pytest

from internvl_jax import configuration
from internvl_jax.plan import experiment, inference


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("stage1_contrastive:tiny", "encode"),
        ("stage2_generative:tiny", "encode"),
        ("stage2_generative:tiny", "prefill"),
        ("stage2_generative:tiny", "decode"),
        ("stage3_sft:tiny", "decode"),
        ("language:tiny", "prefill"),
    ],
)
def test_a_call_is_built_without_data_or_parameters(name, mode):
    config = configuration.load(name)
    built = inference.build(config, jax.devices(), mode)
    assert built.params_trained == 0 < built.params_frozen
    with jax.set_mesh(built.mesh):
        result = jax.eval_shape(built.step, *built.arguments)
    assert jax.tree.leaves(result)[0].shape[0] == config.batch_size
    assert built.model_flops > 0
    # One token does little of what a prompt does.
    if mode == "decode":
        prompt = inference.build(config, jax.devices(), "prefill").model_flops
        assert built.model_flops < prompt / 10


def test_weights_in_int8_are_a_half_of_bfloat16():
    config = configuration.load("stage3_sft:tiny")
    sizes = {
        weights: experiment.bytes_per_device(
            inference.build(config, jax.devices()[:1], "prefill", weights).arguments[0]["llm"]
        )
        for weights in (None, "int8")
    }
    # And a scale of four bytes per channel of 32 or 64 weights.
    assert 0.5 < sizes["int8"] / sizes[None] < 0.65


def test_a_vision_tower_encodes():
    config = configuration.load("stage1_contrastive:tiny", [("model.family", "vision")])
    built = inference.build(config, jax.devices(), "encode", "int8")
    with jax.set_mesh(built.mesh):
        tokens = jax.eval_shape(built.step, *built.arguments)
    assert tokens.shape == (config.batch_size, 17, 32)
    with pytest.raises(inference.InferenceError, match="a vision tower does not"):
        inference.build(config, jax.devices(), "decode")


@pytest.mark.parametrize(
    ("name", "mode", "told"),
    [
        ("stage1_contrastive:tiny", "decode", "InternVL-C"),
        ("stage3_sft:tiny", "encode", "chat"),
    ],
)
def test_what_a_model_cannot_do_is_said(name, mode, told):
    with pytest.raises(inference.InferenceError, match=told):
        inference.build(configuration.load(name), jax.devices(), mode)
