"""Fingerprints under which near-duplicates meet: images by brightness steps, captions by words.

An image has one hash of the whole and some of parts of it, so that a copy with its border cut off
meets the original: hash of the copy's whole = hash of the original's part.
"""

import hashlib
import itertools
import re

import numpy as np
from PIL import Image

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
IMAGE_BITS = 7  # of 64 that may differ between near-duplicates
IMAGE_BANDS = 4  # of 16 bits: hashes that differ in up to three bits share one of them
WORD_HASHES, CAPTION_BANDS = 64, 8  # a signature is cut into bands of eight
CAPTION_SHARE = 0.8  # of the signature that near-duplicate captions have in common
_SIDE = 144  # pixels per side of what the hashes are taken from
_PLAIN = 3  # of 64 steps: an image with fewer up or down has too little in it to be told apart


def image_hashes(picture: Image.Image) -> np.ndarray:
    """uint64 [parts], or all zero for an image that is nearly of one colour.

    A bit tells whether the brightness rises from one cell of a 9 x 8 grid to the next.
    """
    small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    hashes = []
    for part in PARTS:
        box = tuple(share * _SIDE for share in part)
        grid = small.resize((9, 8), Image.Resampling.BOX, box=box)
        cells = np.asarray(grid, np.int16)
        bits = (cells[:, 1:] > cells[:, :-1]).ravel()
        hashes.append(int(np.packbits(bits).view(">u8")[0]))
    steps = hashes[0].bit_count()
    if not _PLAIN <= steps <= 64 - _PLAIN:
        hashes = [0] * len(PARTS)
    return np.array(hashes, np.uint64)


def image_keys(hashes: np.ndarray) -> np.ndarray:
    """Keys uint64 [..., bands] of hashes [...]: near-duplicates share one."""
    width = 64 // IMAGE_BANDS
    shifts = np.arange(IMAGE_BANDS, dtype=np.uint64) * np.uint64(width)
    bits = (hashes[..., None] >> shifts) & np.uint64((1 << width) - 1)
    return bits | np.arange(IMAGE_BANDS, dtype=np.uint64) << np.uint64(width)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Number of bits that differ."""
    return np.bitwise_count(a ^ b)


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
