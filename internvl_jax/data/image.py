"""Images to uint8 arrays by the official transforms: Pillow's antialiased bicubic throughout.

Training normalises on the device, so the transforms give uint8 [H, W, 3]; `normalise` does the same
on the host, also with other models' statistics.
"""

import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image

from internvl_jax.data.errors import RecordError

# About 7 000 pixels square: larger than nearly any photograph, smaller than a decompression bomb.
MAX_PIXELS = 50_000_000
_BICUBIC = Image.Resampling.BICUBIC

# Mean and deviation of red, green and blue in [0, 1], to the digits of the released code. Every
# InternVL uses "imagenet".
STATISTICS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.4814546, 0.4578275, 0.4082107), (0.2686295, 0.2613025, 0.2757711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def read(file: str | os.PathLike | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file and converts it to RGB.

    The size is checked in the header, before any pixel is decoded. Raises ValueError that names
    the file when it is too large, damaged or not an image, FileNotFoundError when it is missing.
    """
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else "image"
    try:
        return _rgb(file, max_pixels)
    except FileNotFoundError:
        raise
    except RecordError as error:
        raise ValueError(f"{name} {error.message}") from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in the bytes of a file. Raises RecordError; see `read`.

    The first frame of an animation; transparency and the EXIF orientation are ignored, as the
    official transforms do. Of 16 bits per value the upper 8 count.
    """
    return _rgb(io.BytesIO(data), max_pixels)


def decoded(source: bytes | np.ndarray) -> Image.Image:
    """`decode`, where pixels stand for themselves."""
    return decode(source) if isinstance(source, bytes) else Image.fromarray(source)


def _rgb(file, max_pixels):
    try:
        with Image.open(file) as image:
            check_size(*image.size, max_pixels)
            if image.mode.startswith("I"):  # Pillow would cut, not scale, what exceeds 255
                pixels = np.asarray(image)
                if pixels.max(initial=0) > 255:
                    pixels = pixels >> 8
                return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        raise RecordError("image_too_large", f"cannot be read as an image: {error}") from error
    # Pillow's readers raise these for damaged files, whatever the format.
    except (OSError, SyntaxError, EOFError, IndexError, OverflowError, TypeError) as error:
        raise RecordError("corrupt_image", f"cannot be read as an image: {error}") from error
    except ValueError as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("corrupt_image", f"cannot be read as an image: {error}") from error


def header(data: bytes) -> tuple[int, int, str]:
    """(width, height, name of the format) of an encoded image, from its header alone."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return *image.size, (image.format or "").lower()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecordError("corrupt_image", f"cannot be read as an image: {error}") from error


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises RecordError for an image whose header claims more than `max_pixels`."""
    if width * height > max_pixels:
        raise RecordError(
            "image_too_large",
            f"has {width} x {height} pixels, more than the {max_pixels} allowed",
        )


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


def pad_to_square(image: Image.Image, statistics: str = "imagenet") -> Image.Image:
    """Puts an image in the middle of a square of the mean colour (InternVL-Chat 1.0)."""
    width, height = image.size
    side = max(width, height)
    color = tuple(int(255 * mean) for mean in STATISTICS[statistics][0])
    result = Image.new("RGB", (side, side), color)
    result.paste(image, ((side - width) // 2, (side - height) // 2))
    return result


def tile_grid(
    width: int, height: int, size: int, max_tiles: int, min_tiles: int = 1
) -> tuple[int, int]:
    """(columns, rows) of the tiles that an image is cut into (InternVL 1.5 on).

    Of all grids with `min_tiles` to `max_tiles` tiles the one whose aspect is nearest to the
    image's; of several equally near, a larger one if the image covers more than half of its pixels.
    """
    limit = range(1, max_tiles + 1)
    grids = {(i, j) for n in limit for i in range(1, n + 1) for j in range(1, n + 1)}
    grids = [(i, j) for i, j in grids if min_tiles <= i * j <= max_tiles]
    best, nearest = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * size * size * columns * rows
        if distance < nearest or (distance == nearest and fills):
            best, nearest = (columns, rows), distance
    return best


def tiles(
    image: Image.Image, size: int, max_tiles: int, min_tiles: int = 1, thumbnail: bool = False
) -> np.ndarray:
    """Cuts an image into squares, row by row: uint8 [N, size, size, 3].

    thumbnail: with more than one tile, the whole image as one more follows.
    """
    columns, rows = tile_grid(*image.size, size, max_tiles, min_tiles)
    whole = np.asarray(image.resize((columns * size, rows * size), _BICUBIC))
    result = squares(whole, size)
    if thumbnail and len(result) > 1:
        result = np.concatenate([result, square(image, size)[None]])
    return result


def squares(whole: np.ndarray, size: int) -> np.ndarray:
    """Cuts pixels [rows·size, columns·size, 3] row by row: [rows·columns, size, size, 3]."""
    rows, columns = whole.shape[0] // size, whole.shape[1] // size
    grid = whole.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    return grid.reshape(rows * columns, size, size, 3)


def normalise(pixels: np.ndarray, statistics: str = "imagenet") -> np.ndarray:
    """uint8 [..., 3] → float32 with mean 0 and deviation 1 under the named statistics."""
    mean, deviation = np.asarray(STATISTICS[statistics], np.float32)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / deviation


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
    # Cut first: resize with a box would mix in pixels from outside the part.
    part = image.crop(random_box(*image.size, rng, scale, ratio))
    return np.asarray(part.resize((size, size), _BICUBIC))


def random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part; see `random_resized_crop`."""
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
    return left, top, left + w, top + h
