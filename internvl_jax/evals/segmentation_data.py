"""Pictures with a class for every pixel: ADE20K from files, and the embedded scenes.

A set is a sequence of (uint8 [H, W, 3], int32 [H, W]); IGNORED pixels count nowhere.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from internvl_jax.data import image, scenes
from internvl_jax.evals import datasets, files

IGNORED = 255
_LONG_TO_SHORT = 4  # the published scale (2016, 504)
Pair = tuple[np.ndarray, np.ndarray]


def scene_set(split: str, count: int, size: int) -> list[Pair]:
    """Embedded scenes; class 0 is the background, class 1 + i the i-th of `scenes.SHAPES`."""
    chosen = [scenes.scene(split, index) for index in range(count)]
    pairs = []
    for one, pixels in zip(chosen, scenes.render(chosen, size), strict=True):
        names = np.array([0, *(1 + scenes.SHAPES.index(o.shape) for o in one.objects)], np.int32)
        pairs.append((pixels, names[scenes.masks(one, size)]))
    return pairs


class Ade20k:
    """A split of ADE20K, read when it is asked for; label 0 ("other") is ignored.

    crop: test pictures are scaled so that their short side has it, and to multiples of `patch`.
    """

    def __init__(self, root: Path, split: str, crop: int, patch: int):
        folder = root / "ade20k"
        self.split, self.crop, self.patch = split, crop, patch
        self.images = files.pictures_in(files.need(folder / "images" / split, "the pictures"))
        annotations = files.need(folder / "annotations" / split, "the annotations")
        self.labels = [annotations / f"{path.stem}.png" for path in self.images]
        missing = [path for path in self.labels if not path.is_file()]
        if missing:
            raise files.DatasetError(f"{len(missing)} annotations are missing: {missing[0]}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        picture = image.read(self.images[index])
        with Image.open(self.labels[index]) as file:
            labels = np.asarray(file).astype(np.int32) - 1
        labels[labels < 0] = IGNORED
        if self.split == "validation":
            picture = _scaled(picture, self.crop, 1.0, self.patch)
        return np.asarray(picture), labels


def ade20k(root: Path, name: str, crop: int, patch: int, partial: bool) -> tuple[Ade20k, Ade20k]:
    """Training and validation pictures. Raises DatasetError: missing, or other counts."""
    datasets.get(name, "segmentation")
    try:
        train, test = (Ade20k(root, split, crop, patch) for split in ("training", "validation"))
    except files.DatasetError as error:
        raise files.DatasetError(f"{name}: {error}; put {datasets.layout(name, root)}") from error
    datasets.check(name, root, {"images": len(train) + len(test)}, partial)
    return train, test


def _scaled(picture: Image.Image, short: int, ratio: float, multiple: int = 1) -> Image.Image:
    """Scale to the short side, with a long side of at most four times it, both at least `short`.

    multiple: sides are rounded up to it.
    """
    sides = picture.size
    factor = min(_LONG_TO_SHORT * short * ratio / max(sides), short * ratio / min(sides))
    if multiple > 1:
        factor = max(factor, short / min(sides))
    new = [-(-max(round(side * factor), 1) // multiple) * multiple for side in sides]
    return picture.resize(tuple(new), Image.Resampling.BILINEAR)


def crop_of(
    pixels: np.ndarray, labels: np.ndarray, crop: int, rng: np.random.Generator, embedded: bool
) -> Pair:
    """A training crop [crop, crop]: scaled by 0.5 to 2, mirrored half of the time, jittered.

    At most 75 % of it is of one class, if ten places give such a one.
    embedded: scaled by 0.75 to 1.25 around its own size instead.
    """
    if embedded:
        ratio = rng.uniform(0.75, 1.25)
        size = tuple(max(round(side * ratio), 1) for side in labels.shape[::-1])
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    else:
        picture = _scaled(Image.fromarray(pixels), crop, rng.uniform(0.5, 2.0))
    pixels = np.asarray(picture)
    coarse = Image.fromarray(labels.astype(np.uint8))
    labels = np.asarray(coarse.resize(picture.size, Image.Resampling.NEAREST)).astype(np.int32)
    for _ in range(10):
        top, left = (int(rng.integers(max(side - crop, 0) + 1)) for side in labels.shape)
        part = labels[top : top + crop, left : left + crop]
        counts = np.bincount(part[part != IGNORED], minlength=1)
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < 0.75:
            break
    cut = pixels[top : top + crop, left : left + crop]
    if rng.random() < 0.5:
        cut, part = cut[:, ::-1], part[:, ::-1]
    cut = _jittered(cut, rng)
    padding = [(0, crop - part.shape[0]), (0, crop - part.shape[1])]
    mean = np.array(image.STATISTICS["imagenet"][0]) * 255
    full = np.broadcast_to(np.rint(mean).astype(np.uint8), (crop, crop, 3)).copy()
    full[: cut.shape[0], : cut.shape[1]] = cut
    return full, np.pad(part, padding, constant_values=IGNORED)


def _jittered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness ±32, contrast and saturation 0.5–1.5, hue ±18°, each half of the time."""
    x = pixels.astype(np.float32)
    if rng.random() < 0.5:
        x = x + rng.uniform(-32, 32)
    early = rng.random() < 0.5  # contrast before or after the colours
    if early and rng.random() < 0.5:
        x = x * rng.uniform(0.5, 1.5)
    hsv = Image.fromarray(np.clip(x, 0, 255).astype(np.uint8)).convert("HSV")
    hue, saturation, value = (np.asarray(channel).astype(np.float32) for channel in hsv.split())
    if rng.random() < 0.5:
        saturation = np.clip(saturation * rng.uniform(0.5, 1.5), 0, 255)
    if rng.random() < 0.5:
        hue = (hue + rng.uniform(-18, 18) * 256 / 360) % 256
    channels = [Image.fromarray(c.astype(np.uint8)) for c in (hue, saturation, value)]
    x = np.asarray(Image.merge("HSV", channels).convert("RGB")).astype(np.float32)
    if not early and rng.random() < 0.5:
        x = x * rng.uniform(0.5, 1.5)
    return np.clip(x, 0, 255).astype(np.uint8)
