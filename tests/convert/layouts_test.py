"""Whole checkpoints: official → ours → official byte for byte, and what does not fit is refused."""

import gzip
import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from internvl_jax import convert
from internvl_jax.convert import internvl, layouts, llama
from internvl_jax.convert.config_json import ConfigError
from internvl_jax.convert.mapping import MappingError, TorchTensors, leaves
from internvl_jax.convert.safetensors_files import Tensors
from internvl_jax.models import ChatConfig, InternVLConfig, LoraConfig, VisionConfig
from internvl_jax.models.config import CHATS, INTERNVLS, LLAMAS, VITS
from internvl_jax.rules import flatten, unflatten
from internvl_jax.sharding import make_mesh
from tests.golden import cases

CASES = [
    (case, file)
    for case in cases.discover()
    for file in case.info["files"]
    if case.category in ("V", "C", "L", "P", "H", "H2") and file.startswith("weights")
]
BF16 = np.dtype(ml_dtypes.bfloat16)
TINY = INTERNVLS["tiny"]


def layout_of(case):
    if {"model", "embed_dim"} & set(case.config):
        return "internvl-c-legacy"
    parts = {"qllama_config": "internvl-14b", "llm_config": "chat", "text_config": "hf"}
    return next((parts[part] for part in parts if part in case.config), "internvit")


def assert_same(result, expected):
    """The same names, dtypes and bytes."""
    assert set(result) == set(expected)
    for name in expected:
        assert result[name].dtype == expected[name].dtype, name
        assert result[name].tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize(("case", "file"), CASES, ids=[f"{c.path.name}-{f}" for c, f in CASES])
def test_round_trip_is_byte_identical(case, file, tmp_path):
    official = {
        key: np.array(array)
        for key, array in case.weights(file).items()
        # The backbone's classification head is no part of the model.
        if not key.startswith(("norm.", "head.")) or layout_of(case) != "internvl-c-legacy"
    }
    config, params = case.load(tmp_path / "official", file)
    convert.export(params, config, tmp_path / "export", layout_of(case))
    assert_same(Tensors(tmp_path / "export"), official)

    half = {key: array.astype(ml_dtypes.bfloat16) for key, array in official.items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half" / "model.safetensors")
    shutil.copy(tmp_path / "export" / "config.json", tmp_path / "half")
    again, narrow = convert.load_torch_layout(tmp_path / "half")
    assert again == config
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {BF16}
    convert.export(narrow, config, tmp_path / "half_export", layout_of(case))
    assert_same(Tensors(tmp_path / "half_export"), half)
    description = json.loads((tmp_path / "half_export" / "config.json").read_text())
    assert description["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(**cases.parameters("Q"))
def test_middleware_alone_goes_there_and_back(case):
    weights = case.weights()
    table = internvl.qllama_rules(
        llama.config_from_json(case.config), case.config["cross_attention_frequency"], ""
    )
    shapes = {}
    for rule in table:  # the official shapes, through the operations, are ours
        first = rule.op.to_jax(weights[rule.keys[0]]).shape
        shapes[rule.ours] = first if rule.layers is None else (len(rule.layers), *first)
    ours = {path: leaf.read() for path, leaf in leaves(table, weights, weights.specs, shapes)}
    tensors = TorchTensors(table, ours)
    assert_same({key: tensors.read(key) for key in tensors.specs}, weights)


def manifest(name):

    path = cases.Path(cases.__file__).parent / "data" / "manifests" / f"{name}.keys.json.gz"
    return {
        key: tuple(shape) for key, shape in json.loads(gzip.decompress(path.read_bytes())).items()
    }


FULL = INTERNVLS["14b"]
MANIFESTS = {
    "InternVL-14B-224px": (FULL, "internvl-14b"),
    "InternVL-14B-364px": (replace(FULL, vit=replace(FULL.vit, image_size=364)), "internvl-14b"),
    "InternVL-C-13B-legacy": (replace(FULL, num_queries=0), "internvl-c-legacy"),
    "InternViT-6B-224px": (VisionConfig(VITS["6b"]), "internvit"),
    "InternViT-6B-448px-V1-2": (
        VisionConfig(replace(VITS["6b"], depth=45, image_size=448)),
        "internvit",
    ),
    "InternViT-300M-448px": (VisionConfig(VITS["300m"]), "internvit"),
    "InternVL-Chat-ViT-6B-Vicuna-7B": (CHATS["vicuna_7b"], "chat-llava"),
    "InternVL-Chat-ViT-6B-Vicuna-13B": (CHATS["vicuna_13b"], "chat-llava"),
    "InternVLChatModel-ViT-6B-LLaMA-13B-later-layout": (
        ChatConfig(
            replace(VITS["6b"], image_size=448),
            LLAMAS["vicuna_13b"],
            projector="pixel_shuffle",
            shuffle_version="v1",
            image_size=448,
        ),
        "chat",
    ),
}


def test_every_manifest_is_tested():
    folder = cases.Path(cases.__file__).parent / "data" / "manifests"
    names = {file.name.removesuffix(".keys.json.gz") for file in folder.glob("*.keys.json.gz")}
    assert names == set(MANIFESTS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_of_a_full_size_model_is_mapped_once_both_ways(name):
    config, layout = MANIFESTS[name]
    official = manifest(name)
    table = layouts.LAYOUTS[layout].rules(config)
    shapes = layouts.parameter_shapes(config)
    layouts.check(table, official, {path: shape.shape for path, shape in shapes.items()})
    keys = [key for rule in table for key in rule.keys]
    assert len(keys) == len(set(keys)) == len(official)
    back = TorchTensors(table, shapes)
    assert {key: spec.shape for key, spec in back.specs.items()} == official
    parameters = sum(np.prod(shape.shape, dtype=np.int64) for shape in shapes.values())
    assert parameters == sum(np.prod(shape, dtype=np.int64) for shape in official.values())
    # The configuration survives the way through config.json.
    description = json.loads(json.dumps(layouts.LAYOUTS[layout].config_to_json(config)))
    again = layouts.LAYOUTS[layout].config_from_json(description, name, official)
    if layout == "internvl-c-legacy":
        assert again == layouts.legacy.config_from_shapes(official, name) == config
    elif isinstance(config, VisionConfig):
        # LayerScale's initial value acts at initialisation only; config.json does not carry it.
        assert replace(again.vit, layer_scale=config.vit.layer_scale) == config.vit
    else:
        assert again == config
    if layout == "chat-llava":  # published without a description of the tower
        del description["vision_config"]
        assert layouts.LAYOUTS[layout].config_from_json(description, name, official) == config


def small(**changes) -> tuple[InternVLConfig, dict]:
    """A tiny InternVL with random numbers everywhere."""
    config = replace(TINY, **changes)
    rng = np.random.default_rng(0)
    shapes = layouts.parameter_shapes(config)
    return config, unflatten(
        {p: rng.normal(size=s.shape).astype(np.float32) for p, s in shapes.items()}
    )


def test_trained_model_exports_in_shards_and_loads_on_a_mesh(tmp_path):
    config, params = small(cross_every=3)
    files = convert.export(params, config, tmp_path / "model", shard_bytes=100_000)
    assert len(files) > 1
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        loaded_config, loaded = convert.load_torch_layout(tmp_path / "model")
    assert loaded_config == config
    kernel = loaded["vit"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_dtype_is_chosen_on_the_way_in_and_out(tmp_path):
    config, params = small()
    convert.export(params, config, tmp_path / "model", dtype="bfloat16")
    assert {s.dtype for s in Tensors(tmp_path / "model").specs.values()} == {BF16}
    _, wide = convert.load_torch_layout(tmp_path / "model", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(ml_dtypes.bfloat16)), wide, params
    )


@pytest.mark.parametrize("base_layer", [True, False])
def test_adapters_load_with_and_without_the_base_layer_level(tmp_path, base_layer):
    config, params = small(lora=LoraConfig(rank=3))
    convert.export(params, config, tmp_path / "model")
    description = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (description["use_backbone_lora"], description["use_qllama_lora"]) == (3, 3)
    official = Tensors(tmp_path / "model")
    key = "vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.default.weight"
    np.testing.assert_array_equal(
        official[key], params["vit"]["blocks"]["attn"]["qkv"]["lora_a"][0].T
    )
    assert sum(".base_layer.weight" in key for key in official) == 4 * 2 + 7 * 3
    if not base_layer:
        (tmp_path / "old").mkdir()
        renamed = {key.replace(".base_layer.", "."): official[key] for key in official}
        save_file(renamed, tmp_path / "old" / "model.safetensors")
        shutil.copy(tmp_path / "model" / "config.json", tmp_path / "old")
    loaded_config, loaded = convert.load_torch_layout(tmp_path / ("model" if base_layer else "old"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    fresh = layouts.parameter_shapes(loaded_config)  # its LoraConfig describes these adapters
    shapes = {path: shape.shape for path, shape in fresh.items()}
    assert shapes == {path: array.shape for path, array in flatten(params).items()}


def test_legacy_buffers_are_ignored_and_other_strangers_are_not(tmp_path):
    vit = replace(TINY.vit, patch_size=14, image_size=42)
    config, params = small(num_queries=0, vit=vit)
    convert.export(params, config, tmp_path / "model", "internvl-c-legacy")
    buffer = "transformer.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({buffer: np.ones(3, np.float32)}, tmp_path / "model" / "buffers.safetensors")
    loaded_config, loaded = convert.load_torch_layout(tmp_path / "model")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    save_file({"stranger": np.ones(3, np.float32)}, tmp_path / "model" / "more.safetensors")
    with pytest.raises(MappingError, match=r"unexpected \(1\):\n    stranger"):
        convert.load_torch_layout(tmp_path / "model")


def test_damaged_checkpoint_lists_everything_at_once(tmp_path):
    config, params = small()
    convert.export(params, config, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {key: np.array(array) for key, array in Tensors(file).items()}
    del tensors["vision_model.encoder.layers.1.ls1"]
    tensors["itm_head.bias"] = np.zeros(3, np.float32)
    tensors["extra"] = np.zeros(3, np.float32)
    save_file(tensors, file)
    with pytest.raises(MappingError) as error:
        convert.load_torch_layout(tmp_path / "model")
    text = str(error.value)
    assert "vision_model.encoder.layers.{i}.ls1   i = 1" in text
    assert "itm_head.bias: has (3,), needs (2,)" in text and "\n    extra" in text


def test_refused_export_leaves_nothing(tmp_path):
    config, params = small()
    broken = {name: value for name, value in params.items() if name != "queries"}
    broken["stranger"] = np.zeros(3, np.float32)
    with pytest.raises(MappingError, match=r"(?s)missing \(1\):\n    queries.*stranger"):
        convert.export(broken, config, tmp_path / "model")
    vit = replace(TINY.vit, patch_size=14, image_size=42)
    other, with_queries = small(vit=vit)
    with pytest.raises(MappingError, match="queries has no rule"):
        convert.export(with_queries, other, tmp_path / "model", "internvl-c-legacy")
    contrastive, without_queries = small(num_queries=0)
    with pytest.raises(ConfigError, match="internvl-c-legacy"):
        convert.export(without_queries, contrastive, tmp_path / "model")
    with pytest.raises(ConfigError, match="unknown layout 'onnx'; known are internvl-14b"):
        convert.export(params, config, tmp_path / "model", "onnx")
    assert not list(tmp_path.iterdir())


def test_export_interrupted_halfway_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    config, params = small()
    read = TorchTensors.read

    def interrupted(self, key):
        if key.startswith("qllama.model.layers.1."):
            raise KeyboardInterrupt
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(TorchTensors, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert.export(params, config, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    convert.export(params, config, tmp_path / "model")
    with pytest.raises(FileExistsError):
        convert.export(params, config, tmp_path / "model")
    jax.tree.map(
        np.testing.assert_array_equal, convert.load_torch_layout(tmp_path / "model")[1], params
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "CLIPModel.*InternVLChatModel"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config .* hidden_act = 'relu'"),
        ({"qllama_config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling"),
        ({"clip_embed_dim": None}, "has no 'clip_embed_dim'"),
    ],
)
def test_unsupported_configuration_is_named(tmp_path, change, message):
    config, params = small()
    convert.export(params, config, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    description = json.loads(path.read_text())
    for name, value in change.items():
        if isinstance(value, dict):
            description[name] |= value
        elif value is None:
            del description[name]
        else:
            description[name] = value
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=message):
        convert.load_torch_layout(tmp_path / "model")
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        convert.load_torch_layout(tmp_path / "model")
    path.unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        convert.load_torch_layout(tmp_path / "model")
