"""What near-duplicates are known by: images by a thumbnail, captions by their words.

Images are compared by views of their thumbnails: of the whole and of some of its parts, so that a
copy with its border cut off meets the original (view of the copy's whole = view of the original's
part). Which of a view's lowest frequencies are positive is a key under which near-duplicates meet;
whether two that meet are copies is told by the difference of their views.
"""

import functools
import hashlib
import itertools
import re

import numpy as np
from PIL import Image

SIDE = 24  # of a thumbnail, in pixels
# Parts of an image as shares of its sides: the whole, and what is left of it without a border of
# 2.5 or 5 % all round, or of 5 % at a corner or a side.
PARTS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.025, 0.025, 0.975, 0.975),
    (0.05, 0.05, 0.95, 0.95),
    (0.0, 0.0, 0.95, 0.95),
    (0.05, 0.0, 1.0, 0.95),
    (0.0, 0.05, 0.95, 1.0),
    (0.05, 0.05, 1.0, 1.0),
    (0.05, 0.0, 1.0, 1.0),
    (0.0, 0.05, 1.0, 1.0),
    (0.0, 0.0, 0.95, 1.0),
    (0.0, 0.0, 1.0, 0.95),
)
KEY_BITS = 18  # the lowest frequencies of a view, by sign
PROBES = 5  # of them, the least certain, of which the view of a whole takes either sign
HEAD = 8  # of the lowest frequencies, the mean first, by which most pairs are told apart
ZERO = 0.5  # of 255, above which a frequency counts: in symmetric images many are none at all
IMAGE_SHARE = 0.35  # of the contrast, by which copies may differ (root mean square) ...
IMAGE_NOISE = 1.0  # ... besides this much of 255 that encoding costs
PLAIN = 1.0  # of 255: an image of less contrast has nothing in it to be compared
WORD_HASHES, CAPTION_BANDS = 64, 8  # a signature is cut into bands of eight
CAPTION_SHARE = 0.8  # of the signature that near-duplicate captions have in common
_GRID = 12  # cells per side of a view


def thumbnail(picture: Image.Image) -> np.ndarray:
    """Brightness of an image in few pixels: uint8 [SIDE * SIDE]."""
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.uint8).ravel()


@functools.cache
def _view_matrices() -> np.ndarray:
    """float32 [parts, pixels, cells]: mean brightness of the cells of each part."""
    left, right = np.arange(SIDE), np.arange(1, SIDE + 1)

    def cells(start: float, end: float) -> np.ndarray:  # [cells, pixels], rows add to 1
        edges = np.linspace(start * SIDE, end * SIDE, _GRID + 1)[:, None]
        covered = np.minimum(edges[1:], right) - np.maximum(edges[:-1], left)
        return np.clip(covered, 0, None) / (edges[1:] - edges[:-1])

    found = [np.kron(cells(top, bottom), cells(a, b)).T for a, top, b, bottom in PARTS]
    return np.stack(found).astype(np.float32)


@functools.cache
def _frequencies() -> np.ndarray:
    """float32 [cells, 1 + KEY_BITS]: the lowest of the cosine transform, the mean first.

    Scaled so that the squares of all that it leads to would add to the mean square of the view.
    """
    number = np.arange(_GRID)
    wave = np.cos(np.pi * np.outer(number, number + 0.5) / _GRID) * np.sqrt(2 / _GRID)
    wave[0] /= np.sqrt(2)
    order = sorted(itertools.product(range(_GRID), repeat=2), key=lambda uv: (sum(uv), uv))
    waves = [np.outer(wave[u], wave[v]).ravel() / _GRID for u, v in order[: 1 + KEY_BITS]]
    return np.stack(waves, axis=1).astype(np.float32)


def views(thumbnails: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """View float32 [N, cells] of a part of each thumbnail uint8 [N, pixels]: parts int [N]."""
    found = np.empty((len(thumbnails), _GRID * _GRID), np.float32)
    for part in np.unique(parts):
        chosen = parts == part
        found[chosen] = thumbnails[chosen].astype(np.float32) @ _view_matrices()[part]
    return found


def contrast(view: np.ndarray) -> np.ndarray:
    """Standard deviation [...] of the brightness of views [..., cells]."""
    return view.std(axis=-1)


def copies(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Whether views [N, cells] and [M, cells] differ as copies of one image do: bool [N, M]."""
    least = np.minimum(contrast(one)[:, None], contrast(two))
    one, two = one - 128, two - 128  # smaller squares lose less in their difference
    square = (one**2).sum(axis=1)[:, None] + (two**2).sum(axis=1) - 2 * one @ two.T
    return square / one.shape[1] <= tolerance(least)


def tolerance(least: np.ndarray) -> np.ndarray:
    """Mean square by which copies may differ, by the smaller contrast of their views."""
    return (IMAGE_SHARE * least) ** 2 + IMAGE_NOISE**2


def image_keys(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys under which views of N thumbnails meet, K each: the whole's under every sign of its
    least certain frequencies, then one of each other part.

    Returns keys uint64 [N, K], part uint8 [K], head int8 [N, K, HEAD], and the contrast, rounded
    up, uint8 [N, K]; 0 where the image is too plain.
    """
    flips = np.array(list(itertools.product((0, 1), repeat=PROBES)), np.uint64)  # [probes, bits]
    part = np.array([0] * len(flips) + list(range(1, len(PARTS))), np.uint8)
    count = len(thumbnails)
    keys = np.empty((count, len(part)), np.uint64)
    head = np.empty((count, len(part), HEAD), np.int8)
    spread = np.empty((count, len(part)), np.uint8)
    powers = np.uint64(1) << np.arange(KEY_BITS, dtype=np.uint64)
    pixels = thumbnails.astype(np.float32)
    for number in range(len(PARTS)):
        columns = np.flatnonzero(part == number)
        view = pixels @ _view_matrices()[number]
        waves = view @ _frequencies()
        signs = waves[:, 1:] - ZERO
        key = (signs > 0).astype(np.uint64) @ powers
        if number == 0:
            doubtful = np.argsort(np.abs(signs), axis=1, kind="stable")[:, :PROBES]
            keys[:, columns] = key[:, None] ^ (powers[doubtful] @ flips.T)
            plain = contrast(view) < PLAIN
        else:
            keys[:, columns] = key[:, None]
        waves[:, 0] -= 128
        head[:, columns] = np.clip(np.rint(waves[:, None, :HEAD]), -128, 127)
        spread[:, columns] = np.where(plain, 0, np.ceil(contrast(view)))[:, None]
    return keys, part, head, spread


def caption_signature(caption: str) -> np.ndarray:
    """MinHash of a caption's pairs of words (and of its words, where it is short): uint32 [hashes].

    All zero for a caption without words. Two signatures agree in about the share that the sets of
    pairs have in common.
    """
    from datasketch import MinHash

    words = re.findall(r"\w+", caption.lower())
    if not words:
        return np.zeros(WORD_HASHES, np.uint32)
    pieces = list(words) if len(words) < 4 else [" ".join(p) for p in itertools.pairwise(words)]
    if len(words) == 1:  # scripts without spaces: pairs of letters
        pieces = [words[0][i : i + 2] for i in range(max(1, len(words[0]) - 1))]
    minhash = MinHash(num_perm=WORD_HASHES, seed=1)
    minhash.update_batch([piece.encode() for piece in pieces])
    return minhash.hashvalues.astype(np.uint32)


def caption_keys(signatures: np.ndarray) -> np.ndarray:
    """Keys uint64 [N, bands] of signatures [N, hashes]."""
    count = len(signatures)
    bands = np.ascontiguousarray(signatures).reshape(count, CAPTION_BANDS, -1)
    keys = np.empty((count, CAPTION_BANDS), np.uint64)
    for row in range(count):
        for band in range(CAPTION_BANDS):
            digest = hashlib.blake2b(
                bands[row, band].tobytes(), digest_size=8, person=band.to_bytes(2, "little")
            )
            keys[row, band] = int.from_bytes(digest.digest(), "little")
    return keys
