"""The façade: checkpoints of every kind, and results equal to those of the modules."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

import internvl_jax
from internvl_jax import convert, generate, sharding
from internvl_jax.data import conversation, scenes
from internvl_jax.data.sources import EmbeddedScenes
from internvl_jax.decoding import Decoding
from internvl_jax.loading import LoadError
from internvl_jax.models import bind, create, from_dict
from internvl_jax.train.pretrained import save_params

MODELS = {
    "c": {"family": "internvl", "size": "tiny", "num_queries": 0},
    "g": {"family": "internvl", "size": "tiny"},
    "chat": {"family": "chat", "size": "tiny"},
}
DATA = {"tokenizer": "", "text_length": 48, "template": "brief"}
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
TEXTS = ["A large red star.", "una estrella roja", "빨간 별"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: folder} of random models as training saves them, and one in the official layout."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for number, (name, model) in enumerate(MODELS.items()):
        params = create(from_dict(model), jax.random.key(number))
        save_params(folder / name, params, config={"model": model, "data": DATA})
        if name == "g":
            convert.export(params, from_dict(model), folder / "official")
    return {name: folder / name for name in (*MODELS, "official")}


@pytest.fixture(scope="module")
def model(checkpoints):
    return internvl_jax.load(checkpoints["g"])


def test_text_features_are_those_of_the_module_in_any_batch(model):
    wrapped = [conversation.contrastive_text(text) for text in TEXTS]
    ids = model.tokenizer.encode_batch(wrapped, 48)
    expected = np.asarray(bind(model.config, model.params).encode_text(ids))
    for given in (TEXTS, tuple(TEXTS), ids):
        np.testing.assert_allclose(model.encode_text(given), expected, atol=2e-5)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(model.encode_text(text)[0], expected[i], atol=2e-5)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_image_features_are_those_of_the_module_in_any_batch(model, mode):
    expected = np.asarray(bind(model.config, model.params).encode_image(PIXELS, mode))
    features = model.encode_image(PIXELS, mode)
    assert isinstance(features, np.ndarray) and features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=2e-5)
    np.testing.assert_allclose(model.encode_image(PIXELS[:2], mode), expected[:2], atol=2e-5)
    pictures = [Image.fromarray(PIXELS[0]), PIXELS[1]]
    np.testing.assert_allclose(model.encode_image(pictures, mode), expected[:2], atol=2e-5)


def test_normalised_floats_are_taken_as_they_are(model):
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    floats = (PIXELS / np.float32(255) - mean) / std
    np.testing.assert_allclose(model.encode_image(floats), model.encode_image(PIXELS), atol=2e-5)


def test_states_are_those_of_the_module(model):
    module = bind(model.config, model.params)
    _, expected = module.vit(PIXELS, hidden_states=True)
    np.testing.assert_allclose(model.image_states(PIXELS), expected, atol=2e-5)
    ids = np.array([[1, 7, 9, 2], [1, 5, 2, 0]], np.int32)
    states = model.text_states(ids)
    assert states.shape == (model.config.llama.depth + 1, 2, 4, model.config.llama.width)
    np.testing.assert_allclose(states[-1], module.text_states(ids), atol=2e-5)
    last = states[-1][[0, 1], [3, 2]] @ np.asarray(model.params["text_projection"])
    np.testing.assert_allclose(model.encode_text(ids), last, atol=2e-5)


@pytest.mark.parametrize("kind", ["g", "official"])
def test_a_mesh_changes_where_parameters_lie_and_nothing_else(checkpoints, model, kind):
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    sharded = internvl_jax.load(checkpoints[kind], mesh=mesh)
    kernel = sharded.params["vit"]["blocks"]["attn"]["qkv"]["kernel"]
    whole = model.params["vit"]["blocks"]["attn"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[-1] == whole.shape[-1] // 2
    images, texts = sharded.encode_image(PIXELS, "g"), sharded.encode_text(TEXTS)
    np.testing.assert_allclose(images, model.encode_image(PIXELS, "g"), atol=2e-5)
    np.testing.assert_allclose(texts, model.encode_text(TEXTS), atol=2e-5)
    np.testing.assert_allclose(
        sharded.similarity(images, texts), model.similarity(images, texts), rtol=1e-4, atol=1e-4
    )
    half = internvl_jax.load(checkpoints[kind], "bfloat16", mesh)
    assert half.params["queries"].dtype == "bfloat16"
    assert half.params["vit"]["blocks"]["attn"]["qkv"]["kernel"].sharding == kernel.sharding
    with pytest.raises(sharding.MeshError, match="do not divide"):
        three = sharding.make_mesh(fsdp=3, devices=jax.devices()[:3])
        internvl_jax.load(checkpoints[kind], mesh=three)


def test_generation_is_that_of_each_prompt_alone(model, checkpoints):
    prompts = [[1, 7], [1, 30, 4, 9, 5], [1, 5, 8]]
    settings = dict(max_new_tokens=6, stop_ids=())
    together = model.generate(prompts, PIXELS[:3], **settings)
    assert isinstance(together.ids, np.ndarray) and together.ids.shape == (3, 1, 6)
    for row, prompt in enumerate(prompts):
        alone = model.generate([prompt], PIXELS[row : row + 1], **settings)
        assert np.array_equal(alone.ids[0], together.ids[row])
    chat = internvl_jax.load(checkpoints["chat"])
    picture = [-200] * chat.config.tokens_per_image
    prompts = [[1, *picture, 9], [1, *picture, 6, *picture, 11]]
    images = [PIXELS[0], PIXELS[1:3]]
    together = chat.generate(prompts, images, **settings)
    for row in range(2):
        alone = chat.generate(prompts[row : row + 1], images[row : row + 1], **settings)
        assert np.array_equal(alone.ids[0], together.ids[row])
    swapped = chat.generate(prompts, [PIXELS[3], PIXELS[1:3][::-1]], **settings)
    assert not np.array_equal(swapped.ids, together.ids)


def test_similarity_is_scaled_cosine(model):
    images, words = model.encode_image(PIXELS), model.encode_text(TEXTS)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, words))
    expected = np.exp(model.params["logit_scale"]) * (a @ b.T)
    np.testing.assert_allclose(model.similarity(images, words), expected, rtol=1e-4, atol=1e-4)


def test_captions_are_those_of_the_generator(model):
    decoding = Decoding(max_new_tokens=6, stop_ids=(model.tokenizer.eos_id,))
    prompt = model.tokenizer.encode(conversation.GENERATION_PROMPTS["ko"])
    rows = np.repeat(np.int32([prompt]), len(PIXELS), axis=0)
    module = bind(model.config, model.params)
    ids = jax.jit(lambda p, r: generate.caption(module, p, r, decoding).ids)(PIXELS, rows)
    expected = [model.tokenizer.decode(row).strip() for row in np.asarray(ids)[:, 0]]
    assert model.caption(PIXELS, "ko", num_beams=1, max_new_tokens=6) == expected
    assert model.caption(PIXELS[3:4], "ko", num_beams=1, max_new_tokens=6) == expected[3:4]


def test_chat_answers_about_a_picture(checkpoints):
    model = internvl_jax.load(checkpoints["chat"])
    question = "what color is the object?"
    rounds = [(conversation.image_first(question), None)]
    prompt, _ = conversation.encode_chat(
        model.tokenizer, "brief", rounds, model.config.tokens_per_image
    )
    decoding = Decoding(max_new_tokens=5, stop_ids=(model.tokenizer.eos_id,))
    module = bind(model.config, model.params)
    ids = jax.jit(lambda t, i: generate.answer(module, t, i, decoding).ids)(
        np.int32([prompt]), PIXELS[None, :1]
    )
    expected = model.tokenizer.decode(np.asarray(ids)[0, 0]).strip()
    assert model.chat(PIXELS[0], question, max_new_tokens=5) == expected


def test_official_weights_give_the_same_model(model, checkpoints):
    official = internvl_jax.load(checkpoints["official"])
    assert official.experiment == {}
    np.testing.assert_allclose(
        official.encode_image(PIXELS, "g"), model.encode_image(PIXELS, "g"), atol=2e-5
    )
    np.testing.assert_allclose(official.encode_text(TEXTS), model.encode_text(TEXTS), atol=2e-5)


def test_official_chat_weights_talk_in_the_template_of_their_config(tmp_path):
    """With byte-level tokens, and Qwen2's special ones beside them."""
    config = from_dict(
        {"family": "chat", "size": "tiny", "projector": "pixel_shuffle", "template": "internvl2_5"}
    )
    convert.export(create(config, jax.random.key(3)), config, tmp_path / "chat", layout="chat")
    with pytest.raises(LoadError, match="came without"):
        internvl_jax.load(tmp_path / "chat").chat_prompt([("hello", None)])
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    added = {t: 256 + n for n, t in enumerate(("<|im_start|>", "<|im_end|>", "<img>", "</img>"))}
    for name, content in (("vocab.json", vocabulary), ("added_tokens.json", added)):
        (tmp_path / "chat" / name).write_text(json.dumps(content))
    (tmp_path / "chat" / "merges.txt").write_text("#version: 0.2\n")
    model = internvl_jax.load(tmp_path / "chat")
    assert model.chat_template == "internvl2_5"
    prompt = model.chat_prompt([("<image>\nwhat is it?", None)])
    assert (prompt.count(-200), prompt.count(256), prompt.count(257)) == (4, 3, 2)
    pieces = list(model.reply([("<image>\nwhat is it?", None)], PIXELS[:1], max_new_tokens=5))
    found = model.generate([prompt], [PIXELS[0]], max_new_tokens=5)
    ids = found.ids[0, 0, : found.length[0, 0]]
    assert "".join(pieces).strip() == model.tokenizer.decode(ids).strip() != ""


def test_the_shipped_demo_has_learnt():
    model, source = internvl_jax.load("demo"), EmbeddedScenes("test_single", size=30, image_size=48)
    names = [f"a {color} {shape}" for color, shape in scenes.SEEN_PAIRS]
    logits = model.similarity(model.encode_image(source.images), model.encode_text(names))
    truth = [scenes.SEEN_PAIRS.index(pair) for pair in map(_pair, source.scenes)]
    assert np.mean(logits.argmax(axis=1) == truth) > 0.3  # chance is 1 in 42
    chat = internvl_jax.load("demo-chat")
    asked = source.scenes[:6]
    answers = [chat.chat(image, "what color is the object?") for image in source.images[:6]]
    assert sum(a == _pair(scene)[0] for a, scene in zip(answers, asked, strict=True)) >= 3


def _pair(scene):
    return scene.objects[0].color, scene.objects[0].shape


def test_dtype_is_kept_or_as_asked(checkpoints):
    assert internvl_jax.load(checkpoints["g"]).params["queries"].dtype == "float32"
    assert internvl_jax.load(checkpoints["g"], "bfloat16").params["queries"].dtype == "bfloat16"


@pytest.mark.parametrize(
    "kind, call, words",
    [
        ("chat", lambda m: m.encode_text(["a star"]), "needs an InternVL-C or -G, not a Chat"),
        ("g", lambda m: m.chat(PIXELS[0], "what is it?"), "chat needs a chat checkpoint"),
        ("c", lambda m: m.caption(PIXELS), "middleware"),
        ("g", lambda m: m.caption(PIXELS, "fr"), "'fr'; use en, zh, ko, es"),
        ("g", lambda m: m.encode_image(PIXELS[0]), r"uint8 \[N, H, W, 3\]"),
        ("g", lambda m: m.encode_image(PIXELS[0] / 255), r"normalised images are \[N, H, W, 3\]"),
        ("g", lambda m: m.encode_image(PIXELS.astype(int)), r"uint8 \[H, W, 3\], not int64"),
        ("c", lambda m: m.encode_image(PIXELS, "g"), "mode 'g' needs the middleware"),
    ],
)
def test_what_a_model_cannot_do_is_said(checkpoints, kind, call, words):
    with pytest.raises(ValueError, match=words):
        call(internvl_jax.load(checkpoints[kind]))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(LoadError, match=r"no checkpoint at .*nothing.*demo"):
        internvl_jax.load(tmp_path / "nothing")


def test_importing_the_package_is_free_until_a_name_is_used():
    code = """if True:
        import sys, internvl_jax
        assert not {"jax", "numpy", "internvl_jax.models"} & set(sys.modules)
        assert len(internvl_jax.__all__) <= 10
        assert set(internvl_jax.__all__) <= set(dir(internvl_jax))
        for name in internvl_jax.__all__:
            getattr(internvl_jax, name)
        try:
            internvl_jax.laod
        except AttributeError as error:
            print(error)
    """
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "'laod'" in done.stdout and "load" in done.stdout
