"""Copies of pictures that no setting was chosen by are found, and different pictures told apart."""

import io

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

from internvl_jax.data import scenes
from internvl_jax.data.curate import hashing, matching

SIDE = 96


def squares_of_a_photo():
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        whole = Image.open(file).convert("RGB")
    corners = [
        (left, top)
        for top in range(0, whole.height - SIDE + 1, SIDE)
        for left in range(0, whole.width - SIDE + 1, SIDE)
    ]
    return [whole.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def rendered_scenes():
    descriptions = [scenes.scene("test", n, seed=23) for n in range(24)]
    return [Image.fromarray(pixels) for pixels in scenes.render(descriptions, SIDE)]


def copy(picture, quality=85, scale=1.0, cut=(0.0, 0.0, 0.0, 0.0)):
    """Encoded anew; scale: of the side; cut: shares cut off at the left, top, right and bottom."""
    width, height = picture.size
    left, top, right, bottom = cut
    box = left * width, top * height, (1 - right) * width, (1 - bottom) * height
    part = picture.crop(tuple(round(edge) for edge in box))
    size = [round(side * scale) for side in part.size]
    file = io.BytesIO()
    part.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = (
    {"quality": 30},
    {"quality": 80, "scale": 0.4},
    {"quality": 80, "scale": 1.7},
    {"cut": (0.05, 0.05, 0.05, 0.05)},
    {"cut": (0.0, 0.05, 0.05, 0.0)},
    {"cut": (0.0, 0.0, 0.0, 0.05)},
)


def same(folder, one, two):
    """Whether de-duplication takes the second of two thumbnails out."""
    work = matching.Work(str(folder), "images", 1, (0, 2))
    matching.write_keys(work, 0, np.stack([one, two]))
    matching.match(work, 0)
    return np.load(work.removed(0)).tolist() == [1]


@pytest.mark.parametrize("pictures", [squares_of_a_photo, rendered_scenes])
def test_copies_are_found_and_different_pictures_told_apart(tmp_path, pictures):
    pictures = pictures()
    originals = [hashing.thumbnail(picture) for picture in pictures]
    found = [
        same(tmp_path, original, hashing.thumbnail(copy(picture, **kind)))
        for kind in COPIES
        for picture, original in zip(pictures, originals, strict=True)
    ]
    assert np.mean(found) >= 0.95
    pairs = [
        same(tmp_path, one, two)
        for later, two in enumerate(originals)
        for one in originals[:later]
    ]
    assert np.mean(pairs) <= 0.001
