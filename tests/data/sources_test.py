"""Sources of examples: the embedded sets, a user's files, and that nothing held out is trained."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import questions, scenes, sources, text


def test_embedded_scene_example():
    source = sources.EmbeddedScenes("test", 50, 32)
    example = source[3]
    np.testing.assert_array_equal(example["image"], scenes.render([scenes.scene("test", 3)], 32)[0])
    description = scenes.scene("test", 3).description
    assert example["captions"]["ko"] == text.scene_captions(description, "ko")
    asked = {qa[1:] for qa in example["qa"] if qa[0] == "es"}
    assert asked == set(questions.about_scene(description, "es"))
    assert scenes.ALL_PAIRS[example["class_index"]] == (example["color"], example["shape"])
    assert len(source) == 50 and source.images.shape == (50, 32, 32, 3)


def test_rendering_is_done_once():
    one, two = (sources.EmbeddedScenes("test", 20, 24) for _ in range(2))
    assert one.images is two.images
    with pytest.raises(ValueError, match="read-only"):
        one.images[0] = 0


def test_scenes_that_read_alike_match_each_other():
    source = sources.EmbeddedScenes("test_single", 840, 16)
    ids = {}
    for i in range(len(source)):
        ids.setdefault(source.texts(i)["image_id"], set()).add(source.scenes[i].description)
    assert len(ids) == 84 and all(len(descriptions) == 1 for descriptions in ids.values())


def test_embedded_digit_example():
    source = sources.EmbeddedDigits("test", 16)
    example = source[2]
    assert example["image"].shape == (16, 16, 3)
    assert example["captions"]["en"][0].endswith(text.DIGITS["en"][example["class_index"]])
    assert len({language for language, _, _ in example["qa"]}) == 4


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_record_is_large_enough_and_inside_the_frame(split):
    for value in sources.EmbeddedScenes(split).scenes:
        # Tested on pixels in scenes_test; the rim of a mask costs up to five points of a hundred.
        assert sum(item.side**2 for item in value.objects) >= 0.45
        for item in value.objects:
            assert item.side / 2 <= min(item.x, item.y, 1 - item.x, 1 - item.y) + 1e-9


def hashes(images):
    return {hashlib.sha256(image.tobytes()).hexdigest() for image in images}


def test_nothing_held_out_is_trained_on():
    train = sources.EmbeddedScenes("train")
    digits = sources.EmbeddedDigits("train")
    trained = hashes(train.images) | hashes(digits.images)
    assert len(trained) == len(train) + len(hashes(digits.images))
    for split in ("test", "test_single", "unseen_pairs", "relation_swap"):
        assert not trained & hashes(sources.EmbeddedScenes(split).images), split
    assert not trained & hashes(sources.EmbeddedDigits("test").images)

    pairs = {(o.color, o.shape) for s in train.scenes for o in s.objects}
    unseen = {
        (o.color, o.shape) for s in sources.EmbeddedScenes("unseen_pairs").scenes for o in s.objects
    }
    assert pairs == set(scenes.SEEN_PAIRS) and unseen == set(scenes.UNSEEN_PAIRS)
    assert not pairs & unseen
    named = [text.noun(*pair, None, "en", article=False) for pair in unseen]
    for i in range(1500):
        said = " ".join([*train.texts(i)["captions"]["en"], *map(str, train.questions(i))])
        assert not any(name in said for name in named)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


CHAT = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


def test_jsonl_examples(folder):
    path = write(
        folder,
        {"image": "images/a.png", "caption": "A cat."},
        "",
        {"image": "images/a.png", "caption": {"en": ["a cat", "one cat"], "zh": "一只猫"}},
        {"image": "images/a.png", "conversations": CHAT},
    )
    source = sources.JsonlImages(path)
    assert len(source) == 3
    assert source[0]["image"].shape == (10, 12, 3)
    assert source[0]["captions"] == {"en": ("A cat.",)}
    assert source[1]["captions"] == {"en": ("a cat", "one cat"), "zh": ("一只猫",)}
    assert source[2]["rounds"] == (("<image>\nwhat?", "a cat"),)
    assert source[0]["image_id"] == source[2]["image_id"]
    assert sources.JsonlImages(path, language="fr").texts(0)["captions"] == {"fr": ("A cat.",)}


def test_jsonl_identity_follows_the_content(folder):
    path = write(folder, {"image": "images/a.png", "caption": "a cat"})
    before = sources.JsonlImages(path).identity
    assert sources.JsonlImages(path).identity == before
    write(folder, {"image": "images/a.png", "caption": "a dog"})
    assert sources.JsonlImages(path).identity != before


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "images/a.png", "caption": ', "not valid JSON: "),
        ("[1, 2]", 'must be an object with an "image" path'),
        ({"caption": "x"}, 'must be an object with an "image" path'),
        ({"image": "images/a.png"}, 'neither "caption" nor "conversations"'),
        ({"image": "images/a.png", "caption": 3}, '"caption" must be a text'),
        ({"image": "images/a.png", "caption": {"en": [3]}}, '"caption" must be a text'),
        ({"image": "images/a.png", "conversations": CHAT[:1]}, '"conversations" must alternate'),
        ({"image": "images/a.png", "conversations": CHAT[::-1]}, '"conversations" must alternate'),
        ({"image": "images/no.png", "caption": "x"}, "No such file"),
        ({"image": "../secret.png", "caption": "x"}, "lies outside"),
        ({"image": "data.jsonl", "caption": "x"}, "cannot be read as an image"),
    ],
)
def test_jsonl_errors_name_file_and_line(folder, line, message):
    good = {"image": "images/a.png", "caption": "a cat"}
    source = sources.JsonlImages(write(folder, good, "", line))
    with pytest.raises(ValueError) as error:
        source[1]
    assert str(error.value).startswith(f"{folder / 'data.jsonl'}:3: ")
    assert message in str(error.value)


def test_sources_by_name(folder):
    assert sources.open_source("scenes", 16).identity.startswith("scenes v1 train 12000 at 16")
    assert sources.open_source("scenes/test", 16).split == "test"
    assert len(sources.open_source("digits/test", 16)) == 360
    path = write(folder, {"image": "images/a.png", "caption": "a cat"})
    assert len(sources.open_source(f"jsonl:{path}", 16)) == 1
    with pytest.raises(ValueError, match="unknown data source 'coco'; use one of scenes, digits"):
        sources.open_source("coco", 16)
    with pytest.raises(ValueError, match="no data file at"):
        sources.open_source(f"jsonl:{folder}/absent.jsonl", 16)
    with pytest.raises(ValueError, match="unknown scene split 'dev'"):
        sources.open_source("scenes/dev", 16)
