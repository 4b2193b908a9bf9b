"""I: image files through the transforms and the tiling, and the tile grid of many sizes."""

import re

import numpy as np
import pytest

from internvl_jax.data import image
from tests.golden import cases

PIXELS = 1e-6


@pytest.mark.parametrize(**cases.parameters("I"))
def test_images(case):
    if "rows" in case.info:
        for recorded in case.info["rows"]:
            row = dict(zip(case.info["columns"], recorded, strict=True))
            grid = image.tile_grid(
                row["width"], row["height"], row["tile_size"], row["max_num"], row["min_num"]
            )
            assert grid == (row["grid_columns"], row["grid_rows"]), row
        return
    compare = cases.Comparison(case)
    size = case.info["size"]
    for file in (name for name in case.info["files"] if not name.endswith(".safetensors")):
        picture = image.read(case.path / file)
        stem = file.rpartition(".")[0]
        for name in compare.names(f"{stem}."):
            result = transform(picture, name.removeprefix(f"{stem}."), size, case, name)
            expected = compare.expected(name)
            result = np.moveaxis(result, -1, -3)
            assert result.shape == expected.shape, name
            np.testing.assert_allclose(result, expected, rtol=0, atol=PIXELS, err_msg=name)
    compare.done()


def transform(picture, kind, size, case, name):
    """float32 [..., size, size, 3] of one picture under the recorded transform."""
    if kind.startswith("tiles"):
        # The settings of a tiling stand in its description.
        meaning = case.info["tensors"][f"out.{name}"]["meaning"]
        side = int(re.search(r"tile (\d+)", meaning)[1])
        least = re.search(r"min_num=(\d+)", meaning)
        return image.normalise(
            image.tiles(
                picture,
                side,
                int(re.search(r"max_num=(\d+)", meaning)[1]),
                int(least[1]) if least else 1,
                thumbnail=re.search(r"use_thumbnail=(\w+)", meaning)[1] == "True",
            )
        )
    if kind == "classification":
        return image.normalise(image.center_crop(picture, size))
    if kind == "chat_pad":
        return image.normalise(image.square(image.pad_to_square(picture), size))
    statistics = {"retrieval": "imagenet", "chat": "imagenet"}.get(kind, kind.removeprefix("chat_"))
    return image.normalise(image.square(picture, size), statistics)
