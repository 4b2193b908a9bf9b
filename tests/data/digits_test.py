"""The embedded real images: split, scaling, and that no test scan is trained on."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from internvl_jax.data import digits


def test_splits_share_no_scan_and_leave_none_out():
    scans, labels = load_digits(return_X_y=True)
    test_images, test_labels = digits.load("test", 8)
    train_images, train_labels = digits.load("train", 8)
    np.testing.assert_array_equal(test_labels, labels[::5])
    # At 8 pixels nothing is resampled: the picture is the scan itself, 16 grey levels to 255.
    expected = np.rint(scans[::5].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(test_images[..., 0], expected)
    held_out = {image.tobytes() for image in test_images}
    assert not held_out & {image.tobytes() for image in train_images}
    assert len(test_images) + len(train_images) >= 0.99 * len(scans)
    assert set(train_labels) == set(range(10))


def test_images_are_enlarged_in_rgb():
    images, labels = digits.load("train", 48)
    assert images.shape == (len(labels), 48, 48, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    small, _ = digits.load("train", 8)
    means = images[:50].mean((1, 2, 3)), small[:50].mean((1, 2, 3))
    np.testing.assert_allclose(*means, atol=6)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown digits split 'dev'; choose one of train, test"):
        digits.load("dev")
