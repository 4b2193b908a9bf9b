"""Image files to uint8 arrays, with Pillow's antialiased bicubic resize throughout.

Normalisation with the ImageNet mean and deviation happens on the device, so all results here
are uint8 [H, W, 3].
"""

import os
from typing import BinaryIO

import numpy as np
from PIL import Image

# About 13 400 pixels square: larger than any photograph, smaller than a decompression bomb.
MAX_PIXELS = 178_956_970
_BICUBIC = Image.Resampling.BICUBIC


def read(file: str | os.PathLike | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file and converts it to RGB.

    The size is checked in the header, before any pixel is decoded. Raises ValueError that names
    the file when it is too large, damaged or not an image, FileNotFoundError when it is missing.
    """
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else "image"
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{name} has {width} x {height} pixels, more than the {max_pixels} allowed"
                )
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def square(image: Image.Image, size: int) -> np.ndarray:
    """Resizes both sides to `size`, whatever the aspect: retrieval, captioning, fine-tuning."""
    return np.asarray(image.resize((size, size), _BICUBIC))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side to `size` and cuts out the centre: classification.

    The long side is cut to a whole number and the crop offset rounded half to even, as
    torchvision does.
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    image = image.resize((width, height), _BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Cuts out a random part of the area and resizes it to a square.

    scale: limits of the share of the area; ratio: limits of width over height, drawn evenly in
    its logarithm. After ten parts that do not fit, the largest fitting centre is taken.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    # Cut first: resize with a box would mix in pixels from outside the part.
    return np.asarray(image.crop((left, top, left + w, top + h)).resize((size, size), _BICUBIC))
