"""The evaluators on the embedded data with untrained tiny models, checked from their details."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from internvl_jax import generate
from internvl_jax.data import conversation, scenes, sources, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.decoding import Decoding
from internvl_jax.evals import attention, captioning, chat, evaluate, evaluator, scores, zero_shot
from internvl_jax.models import bind, create
from internvl_jax.models.config import CHATS, INTERNVLS, LANGUAGE_MODELS

INTERNVL, CHAT = INTERNVLS["tiny"], CHATS["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="module")
def params():
    return create(INTERNVL, jax.random.key(0))


@pytest.fixture(scope="module")
def chat_params():
    return create(CHAT, jax.random.key(0))


def _build(name, **options):
    return evaluator.build({name: options})[name]


def test_zero_shot_figures_follow_from_features_of_single_prompts(params, tokenizer):
    one = _build("zero_shot", languages=["en", "es"])
    figures = dict(one.run(INTERNVL, params))
    assert set(figures) == {
        *(f"{s}.{x}" for s in ("scenes", "unseen_pairs", "digits") for x in ("en", "es")),
        "unseen_color",
        "unseen_shape",
    }
    # Independent: the digits in Spanish, without batches or shared code.
    source = sources.EmbeddedDigits("test", 32)
    encode_text = jax.jit(lambda ids: bind(INTERNVL, params).encode_text(ids))
    encode_image = jax.jit(lambda pixels: bind(INTERNVL, params).encode_image(pixels))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    classes = []
    for prompts in text.digit_prompts("es"):
        ids = tokenizer.encode_batch([f"summarize:{p}" for p in prompts], 32)
        classes.append(unit(unit(np.asarray(encode_text(ids))).mean(axis=0)))
    images = unit(np.asarray(encode_image(source.images)))
    predicted = np.argmax(images @ np.stack(classes).T, axis=-1)
    assert figures["digits.es"] == pytest.approx(np.mean(predicted == source.labels), abs=0.006)
    for name in ("scenes.en", "unseen_pairs.es", "digits.en"):
        found = one.details[name]
        assert figures[name] == np.trace(found["confusion"]) / found["confusion"].sum()
    unseen = one.details["unseen_pairs.en"]
    names = one.details["classes.scenes"]
    split = [
        (names[p].split(), names[t].split())
        for p, t in zip(unseen["predicted"], unseen["labels"], strict=True)
    ]
    assert {" ".join(t) for _, t in split} == {" ".join(p) for p in scenes.HELD_OUT_PAIRS}
    assert figures["unseen_color"] == pytest.approx(np.mean([p[0] == t[0] for p, t in split]))
    assert figures["unseen_shape"] == pytest.approx(np.mean([p[1] == t[1] for p, t in split]))


def test_class_embeddings_average_unit_prompts(params, tokenizer):
    prompts = [["a red star", "a photo of a red star"], ["a blue ring"]]
    classes = zero_shot.class_embeddings(INTERNVL, params, prompts, tokenizer, 32, batch_size=2)
    single = zero_shot.class_embeddings(
        INTERNVL, params, [[p] for group in prompts for p in group], tokenizer, 32, batch_size=3
    )
    mean = (single[0] + single[1]) / 2
    np.testing.assert_allclose(classes[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(classes[1], single[2], atol=1e-6)


def test_retrieval_over_distinct_captions(params):
    one = _build("retrieval", languages=["en", "ko"], count=60)
    figures = dict(one.run(INTERNVL, params))
    assert len(figures) == 2 * 2 * 2 * 3
    for language in ("en", "ko"):
        assert len(set(one.details[f"captions.{language}"])) == 60
        for mode in ("c", "g"):
            found = one.details[f"{mode}.{language}"]
            for way in ("i2t", "t2i"):
                first = found[f"{way}_hits"][:, 0]
                share = np.mean(first == np.arange(60))
                assert figures[f"{mode}.{language}.{way}_r1"] == pytest.approx(share)
                r5, r10 = (figures[f"{mode}.{language}.{way}_r{k}"] for k in (5, 10))
                assert share <= r5 <= r10 < 0.5  # chance is 1/6 at ten of sixty
    assert one.details["images"].shape == (60, 32, 32, 3)


def test_an_internvl_c_is_evaluated_without_middleware():
    config = replace(INTERNVL, num_queries=0)
    figures = evaluate.evaluate(
        config,
        create(config, jax.random.key(1)),
        ["relation"],
        {"evals": {"relation": {"languages": ["zh"]}}},
    )
    assert set(figures) == {f"relation.c.zh.{n}" for n in ("text", "image", "group")}
    assert evaluator.suited(config) == ("zero_shot", "retrieval", "relation")


def test_captions_are_those_of_the_model_alone(params, tokenizer):
    one = _build("caption", languages=["en", "zh"], count=12, max_new_tokens=6, batch_size=8)
    figures = dict(one.run(INTERNVL, params))
    assert set(figures) == {
        "color", "shape", "exact.en", "exact.zh", "cider.en", "cider.zh"
    }  # fmt: skip
    model = bind(INTERNVL, params)
    prompt = tokenizer.encode("Chinese caption:")
    decoding = Decoding(max_new_tokens=6, stop_ids=(tokenizer.eos_id,))
    alone = jax.jit(lambda x, ids: generate.caption(model, x, ids, decoding).ids[0, 0])
    for index in (0, 11):
        ids = alone(one.details["images"][index][None], np.array([prompt], np.int32))
        assert one.details["captions.zh"][index] == tokenizer.decode(np.asarray(ids)).strip()
    mean, each = scores.cider(one.details["captions.en"], one.details["references.en"], "en")
    assert figures["cider.en"] == pytest.approx(mean)
    assert np.array_equal(one.details["cider.en"], each)


def test_only_the_first_colour_and_shape_of_a_caption_count():
    scene = next(s for s in (scenes.scene("test", i) for i in range(99)) if len(s.objects) == 2)
    (a, b), absent = scene.objects, set(scenes.COLORS) - {o.color for o in scene.objects}
    wrong = sorted(absent)[0]
    right = captioning.names_right
    assert right(f"a {a.color} {a.shape}", scene) == {"color": True, "shape": True}
    assert right(f"a {b.color} {a.shape}", scene) == {"color": True, "shape": True}
    assert right(f"a {wrong} {a.color} {b.shape}", scene) == {"color": False, "shape": True}
    assert right("a picture", scene) == {"color": False, "shape": False}


def test_right_captions_get_full_marks():
    chosen = [scenes.scene("test", i) for i in scenes.distinct("test", 40)]
    captions = [text.scene_captions(s.description, "en")[0] for s in chosen]
    for caption, scene in zip(captions, chosen, strict=True):
        assert captioning.names_right(caption, scene) == {"color": True, "shape": True}


def test_chat_answers_are_compared_with_the_blind_majority(chat_params, tokenizer):
    one = _build("chat", languages=["en", "ko"], scenes=10, digits=4, batch_size=20)
    figures = dict(one.run(CHAT, chat_params))
    found = one.details
    assert len(found["answers"]) == 28 and found["images"].shape == (28, 32, 32, 3)
    assert figures["accuracy"] == np.mean(found["right"])
    assert 0 < figures["majority_baseline"] < 0.7
    decoding = Decoding(max_new_tokens=24, stop_ids=(tokenizer.eos_id,))
    model = bind(CHAT, chat_params)
    alone = jax.jit(lambda t, x: generate.answer(model, t, x, decoding).ids[0, 0])
    for row in (0, 27):
        ids, _ = conversation.encode_chat(
            tokenizer,
            "brief",
            [(conversation.image_first(found["questions"][row]), None)],
            CHAT.tokens_per_image,
        )
        # Left padding to one length: one compilation for both.
        prompt = np.zeros((1, 64), np.int32)
        prompt[0, 64 - len(ids) :] = ids
        new = alone(prompt, found["images"][row][None, None])
        assert found["answers"][row] == tokenizer.decode(np.asarray(new)).strip()
    again = _build("chat", languages=["en", "ko"], scenes=10, digits=4, batch_size=20)
    assert dict(again.run(CHAT, chat_params)) == figures


def test_kinds_blank_out_what_a_question_is_about():
    assert chat.kind("is there a large red star?", "en") == "is there a large … …?"
    assert chat.kind("is this the digit seven?", "en") == "is this the digit …?"
    assert chat.kind("오른쪽에 무엇이 있는가?", "ko") == "오른쪽에 무엇이 있는가?"
    assert chat.kind("이것은 숫자 칠인가?", "ko") == "이것은 숫자 …인가?"
    assert chat.kind("¿de qué color es la estrella?", "es") == "¿de qué color es la …?"
    assert chat.kind("五角星是什么颜色?", "zh") != chat.kind("红色的物体是什么形状?", "zh")


def test_majority_answers_come_from_training_and_answer_blindly():
    majority = chat.majority_answers(("en",))
    assert majority["en", "what color is the object?"] in scenes.COLORS
    assert majority["en", "what shape is the object?"] in scenes.SHAPES
    assert majority["en", "is there a small … …?"] in ("yes", "no")


def test_attention_maps_are_probabilities_that_follow_the_image(params):
    images = np.stack([sources.EmbeddedScenes("test", 3, 32).image(i) for i in range(3)])
    maps = attention.attention_maps(INTERNVL, params, images, batch_size=2)
    assert maps.shape == (3, INTERNVL.num_queries, 4, 4)
    total = maps.sum(axis=(2, 3))
    assert np.all(maps >= 0) and np.all(total <= 1) and np.all(total > 0.5)
    assert not np.allclose(maps[0], maps[1], atol=1e-4)
    turned = attention.attention_maps(INTERNVL, params, images[::-1], batch_size=3)
    np.testing.assert_allclose(turned[::-1], maps, atol=1e-6)


def test_class_token_maps_are_the_weights_of_the_towers_own_attention(params):
    """Values weighted by the maps give what the tower's attention gives to its class token."""
    images = np.stack([sources.EmbeddedScenes("test", 3, 32).image(i) for i in range(3)])
    maps = attention.class_token_maps(INTERNVL, params, images, batch_size=2)
    depth, heads = INTERNVL.vit.depth, INTERNVL.vit.num_heads
    assert maps.shape == (3, depth, heads, 4, 4)
    vit = bind(INTERNVL, params).vit
    _, states = vit(images, hidden_states=True)
    for number in range(depth):
        block = jax.tree.map(lambda leaf, i=number: leaf[i], vit.blocks)
        x = block.norm1(states[number])
        value = np.asarray(block.attn.project(x)[2])
        weights = maps[:, number].reshape(3, heads, -1)
        weights = np.concatenate([1 - weights.sum(axis=-1, keepdims=True), weights], axis=-1)
        mixed = np.einsum("bhn,bnhd->bhd", weights, value).reshape(3, 1, -1)
        given = block.attn.proj(mixed, scale=block.ls1[...])[:, 0]
        np.testing.assert_allclose(given, block.attn(x, block.ls1[...])[:, 0], atol=1e-5)


def test_options_come_from_the_config_and_its_data():
    built = evaluator.build(
        {"retrieval": {"every": 50, "modes": ["g"]}, "chat": {}},
        {"data": {"languages": ["zh"], "text_length": 48, "template": "vicuna_v1"}},
    )
    assert built["retrieval"].every == 50 and built["retrieval"].modes == ("g",)
    assert built["retrieval"].languages == built["chat"].languages == ("zh",)
    assert built["chat"].template == "vicuna_v1"
    assert built["chat"].every == evaluator.AT_THE_END


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        ({"retreival": {}}, "unknown evaluator 'retreival' .did you mean 'retrieval'"),
        ({"chat": {"digit": 3}}, "no option 'digit' .did you mean 'digits'"),
        ({"chat": {"every": 0}}, "every=0 must be at least 1"),
    ],
)
def test_wrong_names_and_options_are_refused_with_the_right_ones(evals, message):
    with pytest.raises(evaluator.EvaluatorError, match=message):
        evaluator.build(evals)


def test_an_evaluator_for_another_kind_of_model_is_refused(params):
    with pytest.raises(evaluator.EvaluatorError, match=r"chat.*another kind.*zero_shot"):
        evaluate.evaluate(INTERNVL, params, ["chat"])
    with pytest.raises(evaluator.EvaluatorError, match="none of them"):
        evaluate.evaluate(LANGUAGE_MODELS["tiny"], {}, ["retrieval"])
