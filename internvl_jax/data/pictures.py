"""Encoded images, opened by their header and decoded once it is known what is needed of them.

"exact" is Pillow throughout and equals the official transforms. "fast" is for training: JPEGs are
decoded by libjpeg-turbo, scaled down as they are when far more pixels come than are needed, and
resized by area averaging; other formats go the exact way. Both refuse damaged files: a decoder that
fills in what is missing is used by neither.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from internvl_jax.data import image
from internvl_jax.data.errors import RecordError

DECODERS = ("exact", "fast")
Box = tuple[int, int, int, int]
_PLAIN = {"Gray", "YCbCr", "RGB"}  # colour spaces of JPEGs that are decoded to RGB; CMYK is not


class Picture:
    """An image of a known size. cut(box, (width, height)): a part, resized: uint8 [H, W, 3]."""

    def __init__(self, width: int, height: int, cut: Callable[[Box, tuple[int, int]], np.ndarray]):
        self.width, self.height, self.cut = width, height, cut

    @property
    def box(self) -> Box:
        """The whole of it."""
        return 0, 0, self.width, self.height


def opened(
    source: bytes | np.ndarray, decoder: str = "exact", max_pixels: int = image.MAX_PIXELS
) -> Picture:
    """Opens an encoded image, or pixels. Raises RecordError, here or when it is cut.

    The size is checked in the header, before any pixel is decoded.
    """
    if decoder == "fast" and isinstance(source, bytes) and source[:2] == b"\xff\xd8":
        picture = _jpeg(source, max_pixels)
        if picture is not None:
            return picture
    if isinstance(source, bytes):
        return of_image(image.decode(source, max_pixels))
    return of_image(image.decoded(source))


def of_image(whole: Image.Image) -> Picture:
    """A decoded image, cut by the official transforms' bicubic resize."""

    def cut(box, size):
        part = whole if box == (0, 0, *whole.size) else whole.crop(box)
        return np.asarray(part.resize(size, Image.Resampling.BICUBIC))

    return Picture(*whole.size, cut)


def size(source: bytes | np.ndarray, max_pixels: int = image.MAX_PIXELS) -> tuple[int, int]:
    """(width, height) by the header alone. Raises RecordError as `opened` does."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    width, height, _ = image.header(source)
    image.check_size(width, height, max_pixels)
    return width, height


def tile_count(width: int, height: int, size: int, max_tiles: int, thumbnail: bool) -> int:
    """How many squares `tiles` gives for an image of this size."""
    columns, rows = image.tile_grid(width, height, size, max_tiles)
    return columns * rows + (thumbnail and columns * rows > 1)


def tiles(picture: Picture, size: int, max_tiles: int, thumbnail: bool) -> np.ndarray:
    """`image.tiles` of a picture: uint8 [N, size, size, 3]."""
    columns, rows = image.tile_grid(picture.width, picture.height, size, max_tiles)
    whole = picture.cut(picture.box, (columns * size, rows * size))
    result = image.squares(whole, size)
    if thumbnail and len(result) > 1:
        result = np.concatenate([result, picture.cut(picture.box, (size, size))[None]])
    return result


def _jpeg(data: bytes, max_pixels: int) -> Picture | None:
    cv2, simplejpeg = _libraries()
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise RecordError("corrupt_image", f"cannot be read as an image: {error}") from error
    image.check_size(width, height, max_pixels)
    if space not in _PLAIN:
        return None

    def cut(box, size):
        left, top, right, bottom = box
        # The decoder gives the smallest of 1, 1/2, 1/4, 1/8 that keeps the part large enough.
        share = max(size[0] / (right - left), size[1] / (bottom - top))
        least = (1, 1)
        if share < 1:
            least = max(1, int(width * share)), max(1, int(height * share))
        else:
            least = width, height
        try:
            pixels = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=True, fastupsample=True,
                min_width=least[0], min_height=least[1],
            )
        except ValueError as error:
            raise RecordError("corrupt_image", f"cannot be read as an image: {error}") from error
        x, y = pixels.shape[1] / width, pixels.shape[0] / height
        left, right = int(left * x), max(int(left * x) + 1, round(right * x))
        top, bottom = int(top * y), max(int(top * y) + 1, round(bottom * y))
        part = pixels[top:bottom, left:right]
        shrinks = part.shape[1] >= size[0] and part.shape[0] >= size[1]
        return cv2.resize(
            part, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        )

    return Picture(width, height, cut)


@functools.cache
def _libraries():
    try:
        import cv2
        import simplejpeg
    except ImportError as error:
        raise ImportError(
            "data.decoder=fast needs opencv-python-headless and simplejpeg: "
            "pip install 'internvl-jax[data]'; or set data.decoder=exact"
        ) from error
    cv2.setNumThreads(0)  # examples are made in parallel already
    return cv2, simplejpeg
