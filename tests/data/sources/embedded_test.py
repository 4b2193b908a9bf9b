"""The embedded sets, and that nothing held out is trained."""

import hashlib

import numpy as np
import pytest

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
