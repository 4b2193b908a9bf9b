"""The 1797 handwritten digits that scikit-learn ships, as RGB pictures.

Real scans (UCI "Optical Recognition of Handwritten Digits", 8 x 8 grey levels). Record i of the
original order belongs to the test split when i is a multiple of five.
"""

import functools

import numpy as np
from PIL import Image

SPLITS = ("train", "test")
_TEST_EVERY = 5


@functools.cache
def load(split: str, image_size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Returns (images uint8 [N, H, W, 3], labels int32 [N]) of a split, light ink on black.

    Scans that occur more than once in the original appear in one split only: copies of a test
    scan are left out of training. The arrays are shared and read-only.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown digits split {split!r}; choose one of {', '.join(SPLITS)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    scans, labels = load_digits(return_X_y=True)
    in_test = np.arange(len(scans)) % _TEST_EVERY == 0
    test_scans = {scan.tobytes() for scan in scans[in_test]}
    copies = np.array([scan.tobytes() in test_scans for scan in scans])
    keep = in_test if split == "test" else ~copies
    grey = np.rint(scans[keep].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (image_size, image_size)
    large = [np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    labels = labels[keep].astype(np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels
