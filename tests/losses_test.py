"""Losses against numpy on the full matrices."""

import numpy as np
import pytest

from internvl_jax import losses

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_ignores_and_smooths_as_torch_does(smoothing):
    logits = RNG.normal(size=(5, 7)).astype(np.float32)
    labels = np.array([1, -100, 3, 6, -100])
    logp = log_softmax(logits)[[0, 2, 3]]
    nll = -logp[np.arange(3), [1, 3, 6]]
    expected = ((1 - smoothing) * nll - smoothing * logp.mean(axis=-1)).mean()
    assert losses.cross_entropy(logits, labels, smoothing) == pytest.approx(expected, abs=1e-6)


def test_everything_ignored_is_zero_not_nan():
    assert losses.cross_entropy(np.ones((2, 3), np.float32), np.array([-100, -100])) == 0.0


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_contrastive_with_rows_left_out():
    image, text = RNG.normal(size=(2, 6, 5)).astype(np.float32)
    kept = np.array([True, False, True, True, True, False])
    scores = np.exp(1.5) * unit(image) @ unit(text).T
    rows = np.flatnonzero(kept)
    i2t = -log_softmax(scores)[rows, rows].mean()
    t2i = -log_softmax(scores.T)[rows, rows].mean()
    loss, accuracy = losses.contrastive(image, text, np.float32(1.5), kept=kept)
    assert loss == pytest.approx(0.5 * (i2t + t2i), abs=1e-5)
    assert accuracy == pytest.approx((scores.argmax(1) == np.arange(6))[rows].mean())


def test_multi_positive_shares_the_target_between_captions_of_an_image():
    image, text = RNG.normal(size=(2, 4, 5)).astype(np.float32)
    identity = np.array([7, 3, 7, 1], np.int32)
    same = identity[:, None] == identity
    targets = same / same.sum(axis=1, keepdims=True)
    scores = np.exp(0.5) * unit(image) @ unit(text).T
    expected = -0.5 * (
        (targets * log_softmax(scores)).sum(1).mean()
        + (targets * log_softmax(scores.T)).sum(1).mean()
    )
    got = losses.multi_positive(image, text, np.float32(0.5), identity)
    assert got == pytest.approx(expected, abs=1e-5)


def test_next_token_shifts_labels_by_one():
    logits = RNG.normal(size=(1, 3, 4)).astype(np.float32)
    labels = np.array([[2, 1, -100]])
    assert losses.next_token(logits, labels) == pytest.approx(
        -log_softmax(logits)[0, 0, 1], abs=1e-6
    )
