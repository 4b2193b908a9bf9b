"""Batches, their padding, and unit features, against the model called once on everything."""

import jax
import numpy as np
import pytest

from internvl_jax import sharding
from internvl_jax.evals import features
from internvl_jax.models import bind, create, shardings
from internvl_jax.models.config import INTERNVLS

CONFIG = INTERNVLS["tiny"]


@pytest.fixture(scope="module")
def params():
    return create(CONFIG, jax.random.key(0))


def _images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)


def _texts(count, length):
    rng = np.random.default_rng(1)
    ids = np.zeros((count, length), np.int32)
    for row in ids:
        size = rng.integers(3, 12)
        row[:size] = rng.integers(3, 200, size)
    return ids


@pytest.mark.parametrize("batch_size", [4, 7, 100])
def test_in_batches_keeps_order_and_drops_what_it_filled_up(batch_size):
    seen = []

    def double(x, y):
        seen.append(x.shape)
        return {"sum": x + y, "first": x}

    x = np.arange(11 * 3).reshape(11, 3)
    result = features.in_batches(double, (x, 10 * x), batch_size)
    assert np.array_equal(result["sum"], 11 * x)
    assert np.array_equal(result["first"], x)
    assert set(seen) == {(batch_size, 3)}  # one shape, so one compilation


def test_in_batches_refuses_nothing_at_all():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        features.in_batches(lambda x: x, (np.zeros((0, 3)),), 4)


def test_features_do_not_depend_on_the_batch_size(params):
    images, texts = _images(10), _texts(10, 48)
    for mode in ("c", "g"):
        encode = jax.jit(lambda p, x, m=mode: bind(CONFIG, p).encode_image(x, mode=m))
        whole = np.asarray(encode(params, images))
        whole = whole / np.linalg.norm(whole, axis=-1, keepdims=True)
        batched = features.image_features(CONFIG, params, images, mode, batch_size=4)
        np.testing.assert_allclose(batched, whole, atol=1e-6)
    whole = np.asarray(jax.jit(lambda p, x: bind(CONFIG, p).encode_text(x))(params, texts))
    whole = whole / np.linalg.norm(whole, axis=-1, keepdims=True)
    batched = features.text_features(CONFIG, params, texts, batch_size=4)
    np.testing.assert_allclose(batched, whole, atol=1e-6)


def test_columns_of_padding_change_no_text_feature(params):
    short = features.text_features(CONFIG, params, _texts(6, 32), batch_size=6)
    long = features.text_features(CONFIG, params, _texts(6, 80), batch_size=6)
    assert np.array_equal(short, long)


def test_a_mesh_changes_no_feature(params):
    images, texts = _images(10), _texts(10, 32)
    alone = (
        features.image_features(CONFIG, params, images, "g", batch_size=5),
        features.text_features(CONFIG, params, texts, batch_size=5),
    )
    host = jax.tree.map(np.asarray, params)
    mesh = sharding.make_mesh(replica=2, fsdp=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(host, shardings(CONFIG, mesh))
        sharded = (
            features.image_features(CONFIG, placed, images, "g", batch_size=5),
            features.text_features(CONFIG, placed, texts, batch_size=5),
        )
    for a, b in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
