"""The data sets that come with the package: rendered scenes and handwritten digits."""

import functools

import numpy as np

from internvl_jax.data import digits, questions, scenes, text
from internvl_jax.data.sources.base import Source, stable_number

SCENE_COUNTS = {
    "train": 12000,
    "test": 1000,
    "test_single": 840,
    "unseen_pairs": 300,
    "relation_swap": 400,
}
_SCENES_VERSION = 1  # raise it when scenes or captions change, so that old runs do not resume


class EmbeddedScenes(Source):
    """Rendered scenes of a split (`scenes.SPLITS`), kept in memory for the whole process."""

    def __init__(self, split: str = "train", size: int | None = None, image_size: int = 48):
        if split not in SCENE_COUNTS:
            raise ValueError(
                f"unknown scene split {split!r}; choose one of {', '.join(SCENE_COUNTS)}"
            )
        self.split, self.size = split, size or SCENE_COUNTS[split]
        self.image_size = image_size
        self.identity = f"scenes v{_SCENES_VERSION} {split} {self.size} at {image_size}"

    def __len__(self) -> int:
        return self.size

    def image_in(self, index: int) -> np.ndarray:
        return self.images[index]

    def texts_in(self, index: int) -> dict:
        return _scene_texts(self.scenes[index].description)

    def questions_in(self, index: int) -> tuple:
        return _scene_questions(self.scenes[index].description)

    @property
    def scenes(self) -> tuple[scenes.Scene, ...]:
        """The descriptions of all records."""
        return _scenes(self.split, self.size)

    @property
    def images(self) -> np.ndarray:
        """All pictures: uint8 [N, H, W, 3], read-only."""
        return _pictures(self.split, self.size, self.image_size)


@functools.cache
def _scenes(split, size):
    return tuple(scenes.scene(split, i) for i in range(size))


@functools.cache
def _pictures(split, size, image_size):
    pictures = scenes.render(_scenes(split, size), image_size)
    pictures.flags.writeable = False
    return pictures


@functools.lru_cache(1 << 16)
def _scene_texts(description):
    color, shape, _ = description[0][0]
    return {
        "image_id": stable_number(repr(description)),
        "captions": {x: text.scene_captions(description, x) for x in text.LANGUAGES},
        "color": color,
        "shape": shape,
        "class_index": scenes.ALL_PAIRS.index((color, shape)),
    }


@functools.lru_cache(1 << 16)
def _scene_questions(description):
    return tuple(
        (language, *pair)
        for language in text.LANGUAGES
        for pair in questions.about_scene(description, language)
    )


class EmbeddedDigits(Source):
    """The handwritten digits of scikit-learn; see `digits`."""

    def __init__(self, split: str = "train", image_size: int = 48):
        self.split, self.image_size = split, image_size
        self.images, self.labels = digits.load(split, image_size)
        self.identity = f"digits {split} {len(self.labels)} at {image_size}"

    def __len__(self) -> int:
        return len(self.labels)

    def image_in(self, index: int) -> np.ndarray:
        return self.images[index]

    def texts_in(self, index: int) -> dict:
        return _digit_texts(int(self.labels[index]))

    def questions_in(self, index: int) -> tuple:
        digit = int(self.labels[index])
        return tuple(
            (language, *pair)
            for language in text.LANGUAGES
            for pair in questions.about_digit(digit, language)
        )


@functools.cache
def _digit_texts(digit):
    return {
        "image_id": stable_number(f"digit {digit}"),
        "captions": {x: text.digit_captions(digit, x) for x in text.LANGUAGES},
        "class_index": digit,
    }
