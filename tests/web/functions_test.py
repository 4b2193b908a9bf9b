"""The functions behind the page, on small random models and without a browser."""

import itertools
import re

import jax
import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import image
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.loading import Model
from internvl_jax.models import create, from_dict
from internvl_jax.server.requests import ApiError, Limits
from internvl_jax.web import attention, captions, chat, page, pictures, retrieval, zero_shot
from internvl_jax.web.site import Site

LIMITS = Limits(pixels=1_000_000, images=2, prompt_tokens=120, new_tokens=6)


def _model(family):
    config = from_dict({"size": "tiny", "family": family})
    params = create(config, jax.random.key(0))
    return Model(config, params, Tokenizer(), {"data": {"template": "brief", "text_length": 32}})


@pytest.fixture(scope="module")
def internvl():
    return _model("internvl")


@pytest.fixture(scope="module")
def chatting():
    return _model("chat")


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    return pictures.examples(tmp_path_factory.mktemp("offered"))


def test_zero_shot_gives_the_models_own_probabilities(internvl, offered):
    picture, labels = Image.open(offered[0]), ["a red star", "a blue ring", "a dog", "a red star"]
    found = zero_shot.classify(internvl, picture, labels, ["{c}", ""])
    images, texts = internvl.encode_image([picture]), internvl.encode_text(labels[:3])
    (logits,) = internvl.similarity(images, texts)
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert list(found) == labels[:3]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-4)
    averaged = zero_shot.classify(internvl, picture, labels, ["{c}", "a photo of {c}"])
    assert sum(averaged.values()) == pytest.approx(1) and averaged != found


@pytest.mark.parametrize(
    "labels, templates, message",
    [
        (["a star"], ["{c}"], "two labels"),
        (["a star", "  "], ["{c}"], "two labels"),
        (["a star", "a ring"], [], "a template"),
        (["a star", "a ring"], ["a photo"], "needs {c}"),
        (["a star", "a ring"], ["{c.__class__}"], "needs {c}"),
        ([f"label {n}" for n in range(101)], ["{c}"], "at most 100 labels"),
        (["a star", "w" * 201], ["{c}"], "200 characters"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(internvl, offered, labels, templates, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_shot.classify(internvl, Image.open(offered[0]), labels, templates)


def test_another_language_brings_its_words_but_keeps_the_visitors():
    english, spanish = ("\n".join(zero_shot.LABELS[x]) for x in ("en", "es"))
    labels, templates = zero_shot.translated(english, "es")
    assert labels == spanish and "una foto de {c}" in templates
    assert zero_shot.translated("mine\nyours", "es")[0] == "mine\nyours"
    assert zero_shot.translated(english, "ja") == (english, "\n".join(zero_shot.TEMPLATES["ja"]))
    assert all("{c}" in t for templates in zero_shot.TEMPLATES.values() for t in templates)
    assert set(zero_shot.TEMPLATES) == set(zero_shot.NAMES)


def test_retrieval_ranks_a_folder_as_the_model_does(internvl, offered, tmp_path, caplog):
    (tmp_path / "deep").mkdir()
    for number, path in enumerate(offered):
        Image.open(path).resize((300, 200)).save(tmp_path / "deep" / f"{number}.jpg", quality=95)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    gallery = retrieval.of_folder(internvl, str(tmp_path))
    assert len(gallery) == len(offered) and "broken.png" in caplog.text
    hits = retrieval.search(internvl, gallery, " a red star ", 3)
    shown = [Image.open(tmp_path / name) for name in gallery.names]
    images = internvl.encode_image(shown, mode="g")
    (text,) = internvl.encode_text(["a red star"])
    cosines = images @ text / np.linalg.norm(images, axis=1) / np.linalg.norm(text)
    assert [number for number, _ in hits] == np.argsort(-cosines)[:3].tolist()
    np.testing.assert_allclose([value for _, value in hits], np.sort(cosines)[::-1][:3], rtol=1e-4)
    assert gallery.open(hits[0][0]).size == (300, 200)
    with pytest.raises(ValueError, match="what you are looking for"):
        retrieval.search(internvl, gallery, "  ", 3)
    with pytest.raises(ValueError, match="no picture in"):
        retrieval.of_folder(internvl, str(tmp_path / "deep" / "nowhere"))


def test_captions_come_in_the_order_of_the_languages(internvl, offered):
    picture = Image.open(offered[0])
    written = dict(captions.describe(internvl, picture, ["es", "en"]))
    assert list(written) == ["en", "es"]
    assert written["es"] == internvl.caption([picture], "es")[0]
    table = captions.table({"zh": "<script>"})
    assert '<td lang="zh">&lt;script&gt;</td>' in table
    with pytest.raises(ValueError, match="choose a language"):
        list(captions.describe(internvl, picture, []))


def test_chat_answers_grow_and_earlier_turns_are_remembered(chatting, offered):
    picture = Image.open(offered[0])
    start, files = chat.Talk(), offered[:1]
    steps = list(chat.ask(chatting, start, "what is <image>this?", [picture], LIMITS, files))
    answers = [step.rounds[-1][1] for step in steps]
    asked = "<image>\nwhat is this?"
    assert answers[0] == "" and all(b.startswith(a) for a, b in itertools.pairwise(answers))
    assert len(set(answers)) > 2
    expected = "".join(chatting.reply([(asked, None)], [picture], max_new_tokens=6))
    assert answers[-1] == expected
    again = list(chat.ask(chatting, steps[-1], "and now?", [], LIMITS))[-1]
    rounds = [(asked, expected), ("and now?", None)]
    assert again.rounds == (
        (asked, expected),
        ("and now?", "".join(chatting.reply(rounds, [picture], max_new_tokens=6))),
    )
    assert [message["role"] for message in again.shown] == ["user", "assistant"] * 2
    shown, words = again.shown[0]["content"]
    assert shown.alt_text and words == "what is this?"
    three = [picture] * 3
    for question, images, message in (
        (" ", [], "write a question"),
        ("what?", three, "at most 2 pictures"),
        ("w" * 4001, [], "4000 characters"),
        ("why " * 200, [], "120 are allowed"),
    ):
        with pytest.raises(ValueError, match=message):
            list(chat.ask(chatting, chat.Talk(), question, images, LIMITS))


def test_attention_is_shown_over_the_picture_and_told_in_words():
    maps = np.zeros((2, 4, 6, 6), np.float32)
    maps[1, 2, 0, 5] = 0.5
    assert attention.class_token_map(maps, 2, 3)[0, 5] == 0.5
    assert attention.class_token_map(maps, 2, 0)[0, 5] == 0.125
    assert attention.query_map(maps[1], 3)[0, 5] == 0.5
    assert attention.query_map(maps[1], 0)[0, 5] == 0.125
    told = attention.told(maps[1, 2])
    assert told.startswith("50%") and "upper right ninth" in told and "100%" in told
    wide = attention.overlay(Image.new("RGB", (300, 100), "grey"), maps[1, 2]).astype(int)
    assert wide.shape == (160, 480, 3)
    warm = wide[..., 0] - wide[..., 2]
    row, column = np.unravel_index(np.argmax(warm), warm.shape)
    assert row < 30 and column > 400 and warm[150, 20] == 0


def test_uploads_are_read_within_limits_and_upright(tmp_path):
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[274] = 6  # as a telephone held upright writes it
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read(tmp_path / "turned.jpg", LIMITS).size == (20, 40)
    Image.new("RGB", (1001, 1000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    for name, message in (("large", "allowed"), ("text", "not an image")):
        with pytest.raises(ApiError, match=message):
            pictures.read(tmp_path / f"{name}.png", LIMITS)
    with pytest.raises(ApiError, match="not an image"):
        pictures.read(tmp_path / "drawing.svg", LIMITS)
    with pytest.raises(ValueError, match="choose a picture"):
        pictures.read(None, LIMITS)


def test_offered_pictures_are_the_embedded_scenes(offered):
    assert all(image.read(path).size == (256, 256) for path in offered)
    assert len(set(offered)) == len(pictures.EXAMPLES)


def test_tabs_that_a_model_cannot_serve_say_why(internvl, chatting):
    def missing(models):
        tabs = [tab(Site.of(models, LIMITS)) for tab in page.TABS]
        return {tab.TITLE: tab.missing() for tab in tabs if tab.missing() is not None}

    assert missing({"g": internvl, "chat": chatting}) == {}
    assert set(missing({"g": internvl})) == {"Chat"}
    without = missing({"chat": chatting})
    assert set(without) == {"Zero-shot", "Retrieval", "Captions"}
    assert all("--checkpoint" in reason for reason in without.values())
    contrastive = from_dict({"size": "tiny", "family": "internvl", "num_queries": 0})
    plain = Model(contrastive, {}, Tokenizer(), {})
    assert set(missing({"c": plain})) == {"Captions", "Chat"}
    assert "tokenizer.model" in missing({"c": Model(contrastive, {}, None, {})})["Zero-shot"]
    with pytest.raises(ValueError, match="second model of its kind"):
        Site.of({"a": internvl, "b": internvl}, LIMITS)
