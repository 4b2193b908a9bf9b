"""Losses against numpy on the full matrices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import losses
from internvl_jax.sharding import batch_sharding, make_mesh

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


@pytest.mark.parametrize("ring", [False, True])
def test_contrastive_with_rows_left_out(ring):
    image, text = RNG.normal(size=(2, 6, 5)).astype(np.float32)
    kept = np.array([True, False, True, True, True, False])
    scores = np.exp(1.5) * unit(image) @ unit(text).T
    rows = np.flatnonzero(kept)
    i2t = -log_softmax(scores)[rows, rows].mean()
    t2i = -log_softmax(scores.T)[rows, rows].mean()
    loss, accuracy = losses.contrastive(image, text, np.float32(1.5), kept=kept, ring=ring)
    assert loss == pytest.approx(0.5 * (i2t + t2i), abs=1e-5)
    assert accuracy == pytest.approx((scores.argmax(1) == np.arange(6))[rows].mean())


def on_mesh(mesh, function, *arrays):
    """The function's results with batch-sharded arrays on eight devices, or on one."""
    mesh = mesh and make_mesh(*mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        placed = arrays if mesh is None else jax.device_put(arrays, batch_sharding(mesh))
        return jax.device_get(jax.jit(function)(*placed))


def test_contrastive_is_the_same_plain_or_ring_on_one_device_or_eight():
    image, text = RNG.normal(size=(2, 48, 16)).astype(np.float32)
    text, kept = text + 0.5 * image, RNG.random(48) > 0.2

    def run(mesh, ring):
        def loss(image, text, scale, kept):
            return losses.contrastive(
                image, text, scale[0], kept=kept, label_smoothing=0.1, ring=ring
            )

        gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return jax.tree.leaves(
            on_mesh(mesh, lambda i, t, k: gradient(i, t, jnp.full(1, 1.5), k), image, text, kept)
        )

    expected = run(None, False)
    for mesh, ring in [(None, True), ((1, 8, 1), False), ((1, 8, 1), True), ((2, 2, 2), True)]:
        for ours, theirs in zip(run(mesh, ring), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
@pytest.mark.parametrize(("vocabulary", "slices"), [(512, 4), (300, 2), (300, 16)])
def test_vocabulary_in_slices_equals_the_whole(mesh, vocabulary, slices):
    hidden = RNG.normal(size=(8, 5, 16)).astype(np.float32)
    kernel = RNG.normal(size=(16, vocabulary)).astype(np.float32)
    kernel[:, 7] = kernel[:, vocabulary - 3]  # of two equal logits the first is the largest
    labels = RNG.integers(0, vocabulary, (8, 5))
    labels[0, 0] = labels[3] = losses.IGNORE
    labels[1] = (hidden[1] @ kernel).argmax(-1)
    labels[2] = (hidden[2] @ kernel).argmax(-1)

    def run(split):
        def loss(hidden, kernel, labels):
            if split:
                nll, hit = losses.vocabulary_slices(hidden, kernel, labels, slices)
            else:
                logits = hidden @ kernel
                nll, hit = losses.surprise(logits, labels), losses.hits(logits, labels)
            accuracy = losses.mean_over_labels(hit, labels)
            return losses.mean_over_labels(nll, labels), accuracy

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    expected = jax.device_get(jax.jit(run(False))(hidden, kernel, labels))
    got = on_mesh(mesh, lambda hidden, labels: run(True)(hidden, kernel, labels), hidden, labels)
    assert 0.25 < got[0][1] < 1
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


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
