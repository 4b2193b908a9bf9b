"""Conversations with tiles, with several images and with none; and the ways to a square."""

import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import conversation, image, pipelines
from internvl_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def chat(question, answer="yes"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def build(tmp_path):
    """Records and options → the batch of them all, in the order of the records."""
    rng = np.random.default_rng(0)
    pictures = {}
    for name, size in (("wide", (96, 32)), ("square", (40, 40))):
        pictures[name] = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
        pictures[name].save(tmp_path / f"{name}.png")

    def make(records, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
        settings = dict(
            task="instruct", batch_size=len(records), image_size=16, text_length=120, seed=0,
            tokenizer=TOKENIZER, template="brief", num_image_tokens=4, languages=("en",),
            sources=((f"jsonl:{path}", 1.0),),
        )
        batch, skipped, ids = pipelines.build(**settings | options).batches[0]
        order = np.argsort([int(name.split(":")[1]) for name in ids], kind="stable")
        return {name: array[order] for name, array in batch.items()}, skipped, pictures

    return make


def images_in(row):
    return int((row == conversation.IMAGE_TOKEN).sum())


def test_tiles_and_the_tokens_that_stand_for_them(build):
    records = [{"image": f"{n}.png", "conversations": chat("<image>\nwhat?")}
               for n in ("wide", "square")]
    batch, _, pictures = build(records, max_tiles=6)
    assert batch["image"].shape == (2, 7, 16, 16, 3)
    for row, name in enumerate(("wide", "square")):
        expected = image.tiles(pictures[name], 16, 6, thumbnail=True)
        np.testing.assert_array_equal(batch["image"][row, : len(expected)], expected)
        assert not batch["image"][row, len(expected) :].any()
        assert images_in(batch["tokens"][row]) == 4 * len(expected)


def test_text_alone_has_no_image_tokens(build):
    batch, skipped, _ = build([{"conversations": chat("why <image>?")}] * 2)
    assert not batch["image"].any() and not skipped
    assert images_in(batch["tokens"]) == 0
    assert "why ?" in TOKENIZER.decode(batch["tokens"][0])


def test_several_images_stay_where_they_are_marked(build):
    record = {"image": ["wide.png", "square.png"],
              "conversations": chat("<image> beside <image>: same?")}
    batch, _, pictures = build([record] * 2, max_tiles=2)
    assert images_in(batch["tokens"][0]) == 8
    for square, name in enumerate(("wide", "square")):
        np.testing.assert_array_equal(
            batch["image"][0, square], image.square(pictures[name], 16)
        )


def test_records_whose_marks_do_not_fit_are_replaced(build):
    good = {"image": "square.png", "conversations": chat("<image>\nwhat?")}
    bad = {"image": ["wide.png"] * 2, "conversations": chat("<image> what?")}
    many = {"image": ["wide.png"] * 4, "conversations": chat("<image>" * 4)}
    _, skipped, _ = build([good, bad, many, good], max_tiles=2)
    assert {cause for _, cause, _ in skipped} == {"invalid_conversation"}


@pytest.mark.parametrize("way", ["none", "center_crop", "pad_to_square"])
def test_ways_to_a_square(build, way):
    records = [{"image": "wide.png", "conversations": chat("what?")}] * 2
    batch, _, pictures = build(records, augment=way)
    picture = pictures["wide"]
    expected = {
        "none": lambda: image.square(picture, 16),
        "center_crop": lambda: image.center_crop(picture, 16),
        "pad_to_square": lambda: image.square(image.pad_to_square(picture), 16),
    }[way]()
    np.testing.assert_array_equal(batch["image"][0, 0], expected)
