"""Weights in int8: the error of every weight, and what it does to features, logits and memory."""

import functools
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import internvl_jax
from internvl_jax import convert, sharding
from internvl_jax.loading import LoadError
from internvl_jax.models import abstract, bind, from_dict, int8, lora
from internvl_jax.models.int8 import Int8, Int8Error
from internvl_jax.rules import flatten
from internvl_jax.train import state
from internvl_jax.train.pretrained import save_params
from tests.golden import cases, h_test

MODELS = {
    "g": {"family": "internvl", "size": "tiny"},
    "chat": {"family": "chat", "size": "tiny"},
    "adapted": {"family": "internvl", "size": "tiny", "lora": {"rank": 2}},
}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
TEXTS = ["a large red star", "una estrella roja", "빨간 별", "a blue circle"]


def random(config, rng):
    """Parameters as after training: no array of zeros or ones."""

    def one(leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        return noise * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 1 + 0.1 * noise

    return jax.tree.map(one, abstract(config))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: folder} of models as training saves them, and in the official layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    rng = np.random.default_rng(2)
    for name, model in MODELS.items():
        config = from_dict(model)
        params = random(config, rng)
        save_params(folder / name, params, config={"model": model, "data": {"text_length": 48}})
        if name != "chat":
            convert.export(params, config, folder / f"official_{name}")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    """name → (float model, int8 model)."""

    @functools.cache
    def pair(name):
        return tuple(internvl_jax.load(checkpoints[name], weights=w) for w in (None, "int8"))

    return pair


def float64(leaf):
    return np.asarray(leaf.values, np.float64) * np.asarray(leaf.scale, np.float64)


def cosine(a, b):
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("axis", [-2, -1])
def test_no_weight_moves_by_more_than_half_a_step_of_its_channel(axis):
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((3, 50, 40)) * np.exp(3 * rng.standard_normal((3, 50, 40)))
    weights = weights.astype(np.float32)
    weights[1, :, 7] = weights[1, 7, :] = 0
    values, scale = int8.quantise(weights, axis)
    assert values.dtype == np.int8 and scale.dtype == np.float32
    assert np.all(np.abs(values) <= 127)
    steps = weights.astype(np.float64) / scale  # of a division in float32, 127 · 2⁻²⁴ may be lost
    assert np.max(np.abs(values - steps)) <= 0.5 + 127 * 2**-24
    filled = np.any(weights, axis=axis)
    assert np.all(np.max(np.abs(values), axis=axis)[filled] == 127)
    assert not np.any(values[np.broadcast_to(np.abs(weights).max(axis, keepdims=True) == 0,
                                             values.shape)])


@pytest.mark.parametrize("name", ["g", "official_g", "chat"])
def test_every_matrix_is_held_so_and_all_else_as_it_was(loaded, name):
    whole, small = (flatten(model.params) for model in loaded(name))
    assert set(whole) == set(small)
    held = {path for path, leaf in small.items() if isinstance(leaf, Int8)}
    assert held == {path for path in whole if path.endswith(("/kernel", "/embedding"))}
    for path, leaf in small.items():
        if path in held:
            error = np.abs(float64(leaf) - np.asarray(whole[path]))
            assert np.all(error <= np.asarray(leaf.scale) * (0.5 + 1e-5)), path
        else:
            np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_a_fourth_of_the_memory_remains(loaded):
    whole, small = (
        sum(x.nbytes for x in jax.tree.leaves(model.params["vit"]["blocks"]["mlp"]))
        for model in loaded("g")
    )
    # A scale per column of 32 or 64 rows is a tenth more; at width 3200 it is a thousandth.
    assert 0.25 < small / whole < 0.32
    table, quarter = (model.params["llama"]["embed"]["embedding"] for model in loaded("g"))
    assert quarter.values.nbytes * 4 == table.nbytes


def test_features_stay_close(loaded):
    whole, small = loaded("g")
    for mode in ("c", "g"):
        images = [model.encode_image(PIXELS, mode) for model in (whole, small)]
        assert np.all(cosine(*images) > 0.998)
    assert np.all(cosine(whole.encode_text(TEXTS), small.encode_text(TEXTS)) > 0.998)
    assert not np.array_equal(whole.encode_text(TEXTS), small.encode_text(TEXTS))
    official = loaded("official_g")[1]
    np.testing.assert_allclose(official.encode_text(TEXTS), small.encode_text(TEXTS), atol=2e-5)


def test_layers_compute_with_the_rounded_weights_and_nothing_else(loaded):
    small = loaded("chat")[1]
    rounded = jax.tree.map(
        lambda x: x.astype("float32") if isinstance(x, Int8) else x,
        small.params, is_leaf=lambda x: isinstance(x, Int8),
    )  # fmt: skip
    other = replace(small, params=rounded)
    prompt = [1, *[-200] * small.config.tokens_per_image, 9, 30]
    settings = dict(max_new_tokens=8, stop_ids=(), keep_logits=True)
    results = [m.generate([prompt], PIXELS[:1], **settings) for m in (small, other)]
    assert np.array_equal(results[0].ids, results[1].ids)
    np.testing.assert_allclose(results[0].logits, results[1].logits, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["adapted", pytest.param("official_adapted", marks=pytest.mark.slow)]
)
def test_adapters_are_folded_in_first(loaded, name):
    whole, small = loaded(name)
    assert small.config.lora is None
    merged, found = flatten(lora.merged(whole.params)), flatten(small.params)
    assert set(merged) == set(found)
    path = "vit/blocks/attn/qkv/kernel"
    assert not np.array_equal(merged[path], flatten(whole.params)[path])
    error = np.abs(float64(found[path]) - np.asarray(merged[path]))
    assert np.all(error <= np.asarray(found[path].scale) * (0.5 + 1e-3))
    assert np.all(cosine(*(m.encode_image(PIXELS, "g") for m in (whole, small))) > 0.998)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(replica=2, fsdp=2, tensor=2)])
def test_a_mesh_gives_what_one_device_gives(checkpoints, loaded, sizes):
    mesh = sharding.make_mesh(**sizes)
    for name in ("official_g", "g"):
        sharded = internvl_jax.load(checkpoints[name], mesh=mesh, weights="int8")
        kernel = sharded.params["vit"]["blocks"]["mlp"]["fc1"]["kernel"]
        whole = loaded(name)[1].params["vit"]["blocks"]["mlp"]["fc1"]["kernel"]
        pieces = mesh.shape["fsdp"]
        assert kernel.values.addressable_shards[0].data.size * pieces == whole.values.size
        assert kernel.scale.addressable_shards[0].data.size * pieces == whole.scale.size
        one = loaded(name)[1]
        for mode in ("c", "g"):
            images = [m.encode_image(PIXELS, mode) for m in (sharded, one)]
            np.testing.assert_allclose(*images, atol=2e-5)
        np.testing.assert_allclose(sharded.encode_text(TEXTS), one.encode_text(TEXTS), atol=2e-5)
    chat = internvl_jax.load(checkpoints["chat"], mesh=mesh, weights="int8")
    prompts = [[1, *[-200] * chat.config.tokens_per_image, 9]] * 8
    settings = dict(max_new_tokens=4, stop_ids=(), keep_logits=True)
    images = np.concatenate([PIXELS, PIXELS])
    got, expected = (m.generate(prompts, images, **settings) for m in (chat, loaded("chat")[1]))
    assert np.array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.logits, expected.logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*cases.parameters("H")["argvalues"], *cases.parameters("H2")["argvalues"]],
    ids=lambda case: case.path.name,
)  # fmt: skip
def test_recorded_chat_models_choose_the_same_words(case, tmp_path):
    case.load(tmp_path)
    model = internvl_jax.load(tmp_path, weights="int8")
    token = case.info.get("img_context_token_id", case.info.get("image_token_id"))
    config = replace(model.config, image_token_id=token)
    compare = cases.Comparison(case)
    for name in compare.names("logits_"):
        ids, valid, images, present = h_test.batch_of(case, config, name.removeprefix("logits_"))

        @jax.jit
        def run(params, ids, images, valid, present):
            return bind(config, params)(ids, images, valid=valid, present=present)

        logits = np.asarray(run(model.params, ids, images, valid, present))[valid]
        expected = compare.expected(name)[valid]
        best = np.sort(expected, axis=-1)
        gap = best[:, -1] - best[:, -2]
        same = logits.argmax(-1) == expected.argmax(-1)
        assert np.mean(gap > 0.1) > 0.5  # else the next line would say little
        assert np.all(same[gap > 0.1])
        assert np.mean(same) > 0.9


def test_training_and_export_refuse_them(loaded, tmp_path):
    small = loaded("g")[1]
    with pytest.raises(Int8Error, match="training needs floating-point weights"):
        state.create(small.params, ".*", optax.sgd(1.0))
    with pytest.raises(Int8Error, match="an export needs floating-point weights"):
        convert.export(small.params, small.config, tmp_path / "out")


def test_another_kind_of_weights_is_refused(checkpoints):
    with pytest.raises(LoadError, match="weights 'int4': there are int8"):
        internvl_jax.load(checkpoints["g"], weights="int4")
