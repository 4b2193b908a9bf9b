"""The definition of near-duplicate images, in words: beside what matching does in bulk."""

import itertools
import types

import numpy as np
import pytest
from PIL import Image
from scipy import fft

from internvl_jax.data.curate import hashing


def view(thumbnail, part):
    """12 x 12 means of a part; all edges of their cells are tenths of a pixel."""
    fine = np.kron(thumbnail.reshape(24, 24).astype(float), np.ones((10, 10)))
    left, top, right, bottom = (round(share * 240) for share in hashing.PARTS[part])
    height, width = (bottom - top) // 12, (right - left) // 12
    return fine[top:bottom, left:right].reshape(12, height, 12, width).mean(axis=(1, 3))


def keys(view, whole):
    """Signs of the 18 lowest frequencies; of a whole, with either sign of the 5 least certain."""
    waves = fft.dctn(view, norm="ortho")
    order = sorted(itertools.product(range(12), repeat=2), key=lambda uv: (sum(uv), uv))[1:19]
    values = [waves[uv] / 12 - 0.5 for uv in order]  # in steps of brightness, half a one is none
    signs = [value > 0 for value in values]
    if not whole:
        return {tuple(signs)}
    doubtful = sorted(range(18), key=lambda n: abs(values[n]))[:5]
    found = set()
    for choice in itertools.product((False, True), repeat=5):
        for position, sign in zip(doubtful, choice, strict=True):
            signs[position] = sign
        found.add(tuple(signs))
    return found


class Known:
    """What is compared of one thumbnail uint8 [pixels]."""

    def __init__(self, thumbnail):
        self.views = [view(thumbnail, part) for part in range(len(hashing.PARTS))]
        self.keys = [keys(view, part == 0) for part, view in enumerate(self.views)]
        self.plain = self.views[0].std() < 1

    def near(self, other):
        """Whether a key is shared by two views of which one is a whole, and these hardly differ."""
        if self.plain or other.plain:
            return False
        for i, j in itertools.product(range(len(hashing.PARTS)), repeat=2):
            if not (i and j) and self.keys[i] & other.keys[j]:
                one, two = self.views[i], other.views[j]
                allowed = (0.35 * min(one.std(), two.std())) ** 2 + 1
                if ((one - two) ** 2).mean() <= allowed:
                    return True
        return False


def smooth(rng, contrast=60.0):
    """A random thumbnail uint8 [pixels] of a few soft spots."""
    spots = Image.fromarray(rng.normal(128, contrast, (5, 5)).astype(np.float32))
    large = np.asarray(spots.resize((24, 24), Image.Resampling.BICUBIC))
    return np.clip(large, 0, 255).astype(np.uint8).ravel()


def altered(rng, thumbnail):
    """Another thumbnail of the same, perhaps with a border cut off, and with more or less noise."""
    picture = Image.fromarray(thumbnail.reshape(24, 24)).resize((240, 240), Image.Resampling.BOX)
    part = hashing.PARTS[int(rng.integers(len(hashing.PARTS)))]
    cut = picture.crop(tuple(round(240 * share) for share in part)).resize((24, 24))
    noise = rng.normal(0, rng.choice([0, 5, 15, 30, 60]), (24, 24))
    return np.clip(np.asarray(cut) + noise, 0, 255).astype(np.uint8).ravel()


@pytest.fixture(scope="session")
def definition():
    return types.SimpleNamespace(Known=Known, smooth=smooth, altered=altered)
