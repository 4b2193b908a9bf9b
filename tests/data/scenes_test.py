"""Rendered scenes: what is drawn, how large, and which pairs never occur in training."""

import dataclasses

import numpy as np
import pytest

from internvl_jax.data import scenes, text


@pytest.fixture(scope="module")
def samples():
    return {split: [scenes.scene(split, i) for i in range(400)] for split in scenes.SPLITS}


def test_a_record_depends_on_split_seed_and_number_only(samples):
    assert samples["train"][7] == scenes.scene("train", 7)
    first = [scenes.scene("train", 7), scenes.scene("test", 7), scenes.scene("train", 7, seed=1)]
    assert len(set(first)) == 3


def test_pixels_do_not_depend_on_neighbours(samples):
    together = scenes.render(samples["train"][:40], 32)
    alone = np.concatenate([scenes.render([s], 32) for s in samples["train"][:40]])
    assert together.shape == (40, 32, 32, 3) and together.dtype == np.uint8
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_bounding_boxes_fill_at_least_forty_percent(samples, split):
    shares = [scenes.bounding_box_share(s) for s in samples[split]]
    assert min(shares) >= 0.40
    assert max(shares) < 0.95


def test_objects_are_drawn_apart_and_on_their_side(samples):
    for value in samples["train"]:
        if value.relation is None:
            continue
        mask = scenes.masks(value)
        (rows_a, columns_a), (rows_b, columns_b) = (np.nonzero(mask == n) for n in (1, 2))
        a, b = (columns_a, columns_b) if value.relation == "left" else (rows_a, rows_b)
        assert a.max() < b.min()
        across = (rows_a, rows_b) if value.relation == "left" else (columns_a, columns_b)
        # The other relation must not be readable: both objects reach over the common middle.
        assert across[0].min() < across[1].max() and across[1].min() < across[0].max()


def test_an_object_shows_its_colour(samples):
    images = scenes.render(samples["test_single"][:84])
    for value, image in zip(samples["test_single"], images, strict=False):
        inside = image[scenes.masks(value) == 1].mean(0) / 255
        distances = {c: np.abs(inside - rgb).max() for c, rgb in scenes.RGB.items()}
        assert min(distances, key=distances.get) == value.objects[0].color


def test_sizes_are_told_apart(samples):
    sides = {(len(s.objects), o.size): [] for s in samples["train"] for o in s.objects}
    for value in samples["train"]:
        for item in value.objects:
            sides[len(value.objects), item.size].append(item.side)
    assert min(sides[1, "large"]) > max(sides[1, "small"]) + 0.1
    assert min(sides[2, "large"]) > max(sides[2, "small"]) + 0.1


def test_training_never_shows_a_held_out_pair_but_every_part_of_it(samples):
    seen = {(o.color, o.shape) for s in samples["train"] for o in s.objects}
    assert not seen & scenes.HELD_OUT_PAIRS
    assert {c for c, _ in seen} == set(scenes.COLORS) and {s for _, s in seen} == set(scenes.SHAPES)
    assert {(o.color, o.shape) for s in samples["unseen_pairs"] for o in s.objects} == set(
        scenes.UNSEEN_PAIRS
    )
    assert len(scenes.UNSEEN_PAIRS) == 6 and len(scenes.ALL_PAIRS) == 48


def test_relation_swap_exchanges_the_objects(samples):
    for k in range(0, 40, 2):
        one, other = samples["relation_swap"][k], samples["relation_swap"][k + 1]
        assert one.description == (other.description[0][::-1], other.relation)
        assert (
            text.scene_captions(one.description, "en")[0]
            != (text.scene_captions(other.description, "en")[0])
        )


@pytest.mark.parametrize("language", text.LANGUAGES)
def test_retrieval_images_have_distinct_captions(language):
    indices = scenes.distinct("test", 300)
    captions = {
        text.scene_captions(scenes.scene("test", i).description, language)[0] for i in indices
    }
    assert len(captions) == 300


def test_distinct_reports_a_split_that_is_too_poor():
    with pytest.raises(ValueError, match="only 12 distinct"):
        scenes.distinct("unseen_pairs", 13)


@pytest.mark.parametrize(
    "direction, axis, sign", [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
def test_frames_move_the_object_over_a_still_background(samples, direction, axis, sign):
    start = next(s for s in samples["test_single"] if s.objects[0].size == "small")
    images = scenes.frames(start, 5, direction, 40)
    assert images.shape == (5, 40, 40, 3)
    item = start.objects[0]
    background = scenes.render([dataclasses.replace(start, objects=())], 40)[0].astype(int)
    centres = []
    for image in images.astype(int):
        changed = np.abs(image - background).max(-1) > 30
        centres.append(np.argwhere(changed).mean(0)[axis])
    assert item.side < 0.8 and all(sign * d > 0.5 for d in np.diff(centres))


def test_frames_refuse_what_they_cannot_move(samples):
    pair = next(s for s in samples["train"] if len(s.objects) == 2)
    with pytest.raises(ValueError, match="one object"):
        scenes.frames(pair, 3, "left")
    with pytest.raises(ValueError, match="unknown direction"):
        scenes.frames(samples["test_single"][0], 3, "north")


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown scene split 'dev'; choose one of train"):
        scenes.scene("dev", 0)
