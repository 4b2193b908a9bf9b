"""Encoded images: the exact and the fast way, every odd kind of file, and what is refused."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import image, pictures
from internvl_jax.data.errors import RecordError


def photo(width, height, seed=0):
    """A picture with structure at several scales, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (3, 12, 48):
        noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((width, height), Image.BICUBIC)) / cells
    return Image.fromarray((total * 255 / total.max()).astype(np.uint8))


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(600, 420), (300, 256), (2000, 1300), (100, 80)])
@pytest.mark.parametrize("part", ["whole", "crop"])
def test_fast_is_near_exact(size, part):
    data = saved(photo(*size), "JPEG", quality=92)
    fast, exact = pictures.opened(data, "fast"), pictures.opened(data, "exact")
    assert (fast.width, fast.height) == size == (exact.width, exact.height)
    box = fast.box if part == "whole" else (size[0] // 5, 3, size[0] - 7, size[1] // 4 * 3)
    ours, reference = fast.cut(box, (64, 64)), exact.cut(box, (64, 64))
    assert ours.shape == (64, 64, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - reference).mean() < 4


def test_exact_cut_is_crop_and_bicubic_resize():
    picture = photo(90, 70)
    data = saved(picture, "PNG")
    expected = np.asarray(picture.crop((5, 6, 60, 50)).resize((32, 32), Image.BICUBIC))
    for decoder in pictures.DECODERS:  # what is no JPEG takes the exact way in both
        cut = pictures.opened(data, decoder).cut((5, 6, 60, 50), (32, 32))
        np.testing.assert_array_equal(cut, expected)


def test_tiles_of_a_picture_are_those_of_the_image():
    picture = photo(200, 90)
    opened = pictures.opened(saved(picture, "PNG"))
    expected = image.tiles(picture, 32, 6, thumbnail=True)
    np.testing.assert_array_equal(pictures.tiles(opened, 32, 6, True), expected)


def sixteen_bit():
    return Image.fromarray((np.arange(64).reshape(8, 8) * 1024).astype(np.uint16))


def turned(picture):
    exif = picture.getexif()
    exif[0x0112] = 6
    return saved(picture, "JPEG", exif=exif)


def animated():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


ODD = {
    "cmyk": (lambda: saved(photo(20, 10).convert("CMYK"), "JPEG"), (20, 10)),
    "grey jpeg": (lambda: saved(photo(20, 10).convert("L"), "JPEG"), (20, 10)),
    "16 bit": (lambda: saved(sixteen_bit(), "PNG"), (8, 8)),
    "palette with alpha": (
        lambda: saved(photo(20, 10).convert("RGBA").quantize(8), "PNG", transparency=0), (20, 10)
    ),
    "turned by EXIF": (lambda: turned(photo(20, 10)), (20, 10)),
    "animated": (animated, (8, 6)),
    "one pixel": (lambda: saved(photo(1, 1), "JPEG"), (1, 1)),
    "strip": (lambda: saved(Image.new("RGB", (30000, 1), "red"), "PNG"), (30000, 1)),
    "strip jpeg": (lambda: saved(Image.new("RGB", (30000, 1), "red"), "JPEG"), (30000, 1)),
}


@pytest.mark.parametrize("decoder", pictures.DECODERS)
@pytest.mark.parametrize("kind", ODD)
def test_every_odd_image_has_a_result(kind, decoder):
    make, size = ODD[kind]
    picture = pictures.opened(make(), decoder)
    assert (picture.width, picture.height) == size
    box = image.random_box(*size, np.random.default_rng(0))
    for part in (picture.box, box):
        assert picture.cut(part, (16, 16)).shape == (16, 16, 3)
    if kind.startswith("strip") or kind == "animated":
        np.testing.assert_allclose(picture.cut(picture.box, (4, 4)) / 255, [[[1, 0, 0]] * 4] * 4,
                                   atol=0.02)


def test_sixteen_bits_are_scaled_not_cut():
    values = np.asarray(image.decode(saved(sixteen_bit(), "PNG")))[..., 0]
    np.testing.assert_array_equal(values, np.arange(64).reshape(8, 8) * 4)


@pytest.mark.parametrize("decoder", pictures.DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_truncated_images_are_refused(decoder, kind, share):
    data = saved(photo(120, 90), kind)
    data = data[: int(len(data) * share)]
    with pytest.raises(RecordError) as caught:
        picture = pictures.opened(data, decoder)
        picture.cut(picture.box, (32, 32))
    assert caught.value.cause == "corrupt_image"


def bomb():
    """A real PNG of 400 megapixels in a few hundred kilobytes."""
    def chunk(kind, content):
        return (struct.pack(">I", len(content)) + kind + content
                + struct.pack(">I", zlib.crc32(kind + content)))

    packer = zlib.compressobj(1)
    row = bytes(20_000 * 3 + 1)
    content = b"".join(packer.compress(row) for _ in range(200)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("decoder", pictures.DECODERS)
def test_bombs_are_refused_from_their_header(decoder):
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    data = bomb()
    before = resident()
    with pytest.raises(RecordError, match=r"20000 x 20000|400000000 pixels") as caught:
        pictures.opened(data, decoder)
    assert caught.value.cause == "image_too_large"
    assert resident() - before < 50e6  # decoding would take 1.2 GB
    jpeg = bytearray(saved(photo(16, 16), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(RecordError, match=r"20000 x 20000|400000000 pixels"):
        pictures.opened(bytes(jpeg), decoder)
