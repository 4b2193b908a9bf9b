"""Reading and resizing image files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import image


def picture(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture(9, 7, mode).save(tmp_path / "x.png")
    read = image.read(tmp_path / "x.png")
    assert read.mode == "RGB" and read.size == (9, 7)


def test_square_ignores_the_aspect():
    source = picture(40, 20)
    result = image.square(source, 16)
    assert result.shape == (16, 16, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(source.resize((16, 16), Image.BICUBIC)))


@pytest.mark.parametrize("width, height", [(40, 20), (20, 40), (30, 30), (43, 16)])
def test_center_crop_keeps_the_aspect(width, height):
    source = picture(width, height)
    result = image.center_crop(source, 16)
    long = int(16 * max(width, height) / min(width, height))
    wide = width > height
    resized = np.asarray(source.resize((long, 16) if wide else (16, long), Image.BICUBIC))
    start = round((long - 16) / 2)
    expected = resized[:, start : start + 16] if wide else resized[start : start + 16]
    np.testing.assert_array_equal(result, expected)


def test_random_crop_follows_its_stream_and_its_limits():
    column, row = np.meshgrid(np.arange(64), np.arange(64))
    ramps = np.stack([4 * column, 4 * row, 0 * row], -1).astype(np.uint8)
    shares = []
    for seed in range(60):
        crop = image.random_resized_crop(Image.fromarray(ramps), 64, np.random.default_rng(seed))
        again = image.random_resized_crop(Image.fromarray(ramps), 64, np.random.default_rng(seed))
        np.testing.assert_array_equal(crop, again)
        # The ramps tell which part was taken; the ends of a resampled ramp are a little short.
        spans = (np.ptp(crop[..., 0].astype(int)), np.ptp(crop[..., 1].astype(int)))
        shares.append(spans[0] * spans[1] / 252**2)
    assert 0.45 < min(shares) < 0.6 and 0.85 < max(shares) <= 1.0


def test_random_crop_of_a_strip_falls_back_to_the_centre():
    strip = picture(200, 4)
    result = image.random_resized_crop(strip, 8, np.random.default_rng(0))
    expected = strip.crop((97, 0, 102, 4)).resize((8, 8), Image.BICUBIC)
    np.testing.assert_array_equal(result, np.asarray(expected))


def png_header(width, height):
    """A PNG that claims a size in its header and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + head


def test_size_is_refused_from_the_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    with pytest.raises(ValueError, match=r"bomb.png"):
        image.read(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="has 9 x 7 pixels, more than the 50 allowed"):
        file = io.BytesIO()
        picture(9, 7).save(file, "PNG")
        image.read(file, max_pixels=50)


@pytest.mark.parametrize("content", [b"", b"no image", png_header(4, 4)])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.png cannot be read as an image"):
        image.read(tmp_path / "bad.png")


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        image.read("nowhere.png")
