"""Families without recorded numbers: tiny checkpoints of independent PyTorch classes load here."""

import contextlib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from internvl_jax import convert
from internvl_jax.convert.safetensors_files import Tensors
from internvl_jax.models import bind
from internvl_jax.models.chat import IMAGE_TOKEN
from tests.golden.cases import ABSOLUTE

# `make test` collects this file without PyTorch; where its tests run without it, they fail.
with contextlib.suppress(ModuleNotFoundError):
    import torch
    import transformers

    from tests.convert import torch_reference

pytestmark = pytest.mark.slow

VISION = {
    "model_type": "intern_vit_6b",
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "patch_size": 14,
    "image_size": 56,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
}
TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}


def language(kind, **changes):
    """A random tiny language model of `transformers`."""
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, **changes})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    return torch_reference.randomise(model)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, TEXT["vocab_size"], shape).astype(np.int32)


def pixels(size, count=1):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, size, size, 3)).astype(np.float32)


def to_torch(array):
    if array.ndim == 4:  # pixels
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
    return torch.from_numpy(array).long()


def write(model, directory, description):
    directory.mkdir()
    torch_reference.save(model, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(description))


def round_trip(directory, layout, config, params, target):
    """What is exported has the same keys, dtypes and bytes."""
    convert.export(params, config, target, layout)
    before, after = Tensors(directory), Tensors(target)
    assert set(after) == set(before)
    for key in before:
        assert after[key].dtype == before[key].dtype, key
        assert after[key].tobytes() == before[key].tobytes(), key
    assert convert.load_torch_layout(target)[0] == config


def logits(config, params, tokens, *images):
    run = jax.jit(lambda params, *inputs: bind(config, params)(*inputs))
    return np.asarray(run(params, tokens, *images))


SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 24}),
        *(("llama", {"scaling": name}) for name in SCALINGS),
    ],
    ids=str,
)
def test_language_model(kind, changes, tmp_path):
    changes = dict(changes)
    if "scaling" in changes:
        rope = SCALINGS[changes.pop("scaling")] | {"rope_theta": TEXT["rope_theta"]}
        changes |= {"rope_parameters": rope, "max_position_embeddings": 64}
        if rope["rope_type"] == "dynamic":
            changes["max_position_embeddings"] = 16
    model = language(kind, **changes)
    model.save_pretrained(tmp_path / "official")
    config, params = convert.load_torch_layout(tmp_path / "official")
    assert config.llama.architecture == kind
    tokens = ids(2, 40)
    with torch.no_grad():
        expected = model(input_ids=to_torch(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, tokens), expected, rtol=0, atol=ABSOLUTE)
    round_trip(tmp_path / "official", "language", config, params, tmp_path / "again")
    # What is written is what `transformers` reads.
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        result = again(input_ids=to_torch(tokens)).logits.numpy()
    np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE)


def compare_chat(model, config, params, size):
    """Logits of [before | image | after], in a batch with another image."""
    before, after, images = ids(1, 4), ids(1, 5, seed=2), pixels(size, 2)
    with torch.no_grad():
        expected = [
            model(to_torch(before), to_torch(image[None]), to_torch(after)).numpy()
            for image in images
        ]
    inside = np.full((1, config.tokens_per_image), IMAGE_TOKEN, np.int32)
    tokens = np.repeat(np.concatenate([before, inside, after], axis=1), 2, axis=0)
    result = logits(config, params, tokens, images[:, None])
    np.testing.assert_allclose(result, np.concatenate(expected), rtol=0, atol=ABSOLUTE)


@pytest.mark.parametrize("kind", ["internlm2", "qwen2", "qwen3"])
def test_later_chat_model(kind, tmp_path):
    if kind == "internlm2":
        text = TEXT | {"model_type": kind, "architectures": ["InternLM2ForCausalLM"]}
        decoder = torch_reference.InternLM2(text)
    else:
        decoder = language(kind)
        text = decoder.config.to_dict()
    model = torch_reference.Chat(VISION, -2, decoder, TEXT["hidden_size"])
    torch_reference.randomise(model)
    description = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": VISION,
        "llm_config": text,
        "select_layer": -2,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "template": "internvl2_5",
    }
    write(model, tmp_path / "official", description)
    config, params = convert.load_torch_layout(tmp_path / "official")
    compare_chat(model, config, params, 56)
    round_trip(tmp_path / "official", "chat", config, params, tmp_path / "again")


@pytest.mark.parametrize("two", [False, True], ids=["mlp2x_gelu", "two_mlp"])
@pytest.mark.parametrize("published", [False, True], ids=["described", "as_published"])
def test_llava_style_chat_model(two, published, tmp_path):
    # Without a description the head sizes are those of the published models.
    head = 128 if published else 16
    vision = VISION | {"hidden_size": 3 * head, "image_size": 224 if published else 56}
    middleware = dict(width=2 * head, heads=2, mlp=80, depth=3, every=2, queries=5, vocab=17)
    decoder = language("llama", num_key_value_heads=4)
    model = torch_reference.LlavaChat(vision, -4, decoder, middleware if two else None)
    torch_reference.randomise(model)
    description = decoder.config.to_dict() | {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_projector_type": "two_mlp" if two else "mlp2x_gelu",
        "mm_vision_select_layer": -4,
        "mm_vision_tower": "./pretrained/intern_vit_6b_224px",
    }
    if not published:
        description["vision_config"] = vision
        if two:
            description["qllama_config"] = {
                "vocab_size": 17,
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 80,
            }
            description["attn_pool_num_heads"] = 2
    write(model, tmp_path / "official", description)
    config, params = convert.load_torch_layout(tmp_path / "official")
    assert config.input_size == (336 if published else 56)
    compare_chat(model, config, params, config.input_size)
    round_trip(tmp_path / "official", "chat-llava", config, params, tmp_path / "again")


def test_tower_of_45_blocks_at_448_pixels(tmp_path):
    vision = VISION | {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 45}
    vision |= {"image_size": 448, "intermediate_size": 64}
    model = torch_reference.randomise(torch_reference.Vision(vision))
    for layer in model.encoder.layers:  # as trained: branches small enough for 45 of them
        layer.ls1.data *= 0.1
        layer.ls2.data *= 0.1
    write(model, tmp_path / "official", vision | {"architectures": ["InternVisionModel"]})
    config, params = convert.load_torch_layout(tmp_path / "official")
    images = pixels(448)
    with torch.no_grad():
        expected = model(to_torch(images))[-1].numpy()
    result = jax.jit(lambda p, x: bind(config, p).vision(x))(params, images)
    assert result.shape == (1, 1025, 32)
    np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE)
    round_trip(tmp_path / "official", "internvit", config, params, tmp_path / "again")


def native(kind, **changes):
    """A random tiny InternVL of `transformers`, and prompts for its one image."""
    text = language(kind, **changes).config.to_dict()
    vision = {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "attention_bias": kind != "llama",
        "use_qk_norm": kind == "llama",
        "norm_type": "rms_norm" if kind == "llama" else "layer_norm",
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=2,
        image_seq_length=4,
        vision_feature_layer=-2 if kind == "llama" else -1,
        tie_word_embeddings=text["tie_word_embeddings"],
        attn_implementation="eager",
    )
    model = transformers.InternVLForConditionalGeneration(config)
    tokens = np.concatenate([ids(2, 3), np.full((2, 4), 2), ids(2, 4, seed=3)], axis=1)
    return torch_reference.randomise(model), tokens.astype(np.int32), pixels(56, 2)


def official_results(model, tokens, images):
    """Logits, and eight ids chosen greedily."""
    inputs = {
        "input_ids": to_torch(tokens),
        "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
        "pixel_values": to_torch(images),
    }
    with torch.no_grad():
        answers = model.generate(
            **inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0
        )
        return model(**inputs).logits.numpy(), answers.numpy()[:, tokens.shape[1] :]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {}), ("llama", {})],
    ids=str,
)
def test_native_model_there_and_back(kind, changes, tmp_path):
    from internvl_jax import generate
    from internvl_jax.decoding import Decoding

    model, tokens, images = native(kind, **changes)
    model.save_pretrained(tmp_path / "official")
    config, params = convert.load_torch_layout(tmp_path / "official")
    expected, answers = official_results(model, tokens, images)
    result = logits(config, params, tokens, images[:, None])
    np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE)
    decoding = Decoding(max_new_tokens=8, stop_ids=())
    run = jax.jit(lambda p, t, x: generate.answer(bind(config, p), t, x, decoding).ids)
    assert np.array_equal(run(params, tokens, images[:, None])[:, 0], answers)

    round_trip(tmp_path / "official", "hf", config, params, tmp_path / "again")
    again, report = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "again",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    logits_again, answers_again = official_results(again, tokens, images)
    np.testing.assert_allclose(logits_again, result, rtol=0, atol=ABSOLUTE)
    assert np.array_equal(answers_again, answers)


def test_chat_model_becomes_native(tmp_path):
    """The same weights in the released layout and in that of `transformers` give the same."""
    decoder = language("qwen2")
    vision = VISION | {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
    model = torch_reference.Chat(vision, -1, decoder, TEXT["hidden_size"])
    torch_reference.randomise(model)
    description = {
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": decoder.config.to_dict(),
        "ps_version": "v2",
    }
    write(model, tmp_path / "official", description)
    config, params = convert.load_torch_layout(tmp_path / "official")
    config = replace(config, image_token_id=2)
    convert.export(params, config, tmp_path / "native", "hf")
    again = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "native", attn_implementation="eager", dtype=torch.float32
    )
    before, after, images = ids(1, 4), ids(1, 5, seed=2), pixels(56)
    with torch.no_grad():
        expected = model(to_torch(before), to_torch(images), to_torch(after)).numpy()
    inside = np.full((1, config.tokens_per_image), 2, np.int32)
    tokens = np.concatenate([before, inside, after], axis=1)
    result, _ = official_results(again, tokens, images)
    np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE)
