"""Hardest negatives of the batch for matching, against a search by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import losses, models
from internvl_jax.objectives import Generative
from internvl_jax.sharding import batch_sharding, make_mesh
from tests import objectives_test
from tests.train import gradients_test

HARDEST = Generative(itm_negatives="hardest")
TRAINABLE = r"queries|pool2/.*|match_head/.*|logit_scale"


def by_hand(image, text, identities, usable):
    """For each image the number of the hardest text, or None."""
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    found = []
    for row in range(len(image)):
        others = [
            other
            for other in range(len(text))
            if usable[other] and all(values[other] != values[row] for values in identities)
        ]
        found.append(max(others, key=lambda other: image[row] @ text[other], default=None))
    return found


@pytest.mark.parametrize("sizes", [None, (2, 4, 1)])
def test_hardest_texts_equal_a_search_by_hand(sizes):
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 32, 16)).astype(np.float32)
    images = rng.integers(0, 12, 32).astype(np.int32)
    words = rng.integers(0, 20, 32).astype(np.uint32)
    usable = rng.random(32) < 0.7
    expected = by_hand(image, text, (images, words), usable)
    arguments = image, text, (images, words), usable
    if sizes is None:
        found, any_left = losses.hardest_texts(*arguments)
    else:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            arguments = jax.device_put(arguments, batch_sharding(mesh))
            found, any_left = jax.jit(losses.hardest_texts)(*arguments)
    assert None not in expected and np.asarray(any_left).all()
    assert np.asarray(found).tolist() == expected


def test_none_is_left_where_all_belong_to_the_image():
    same = np.zeros(4, np.int32)
    features = np.eye(4, dtype=np.float32)
    _, any_left = losses.hardest_texts(features, features, (same,), np.ones(4, bool))
    assert not any_left.any()


def test_captions_that_are_matched():
    batch = objectives_test.make_batch("generative")
    batch["positive"][1] = batch["positive"][6]  # reads alike
    batch["positive"][5] = [1, 2, *[0] * 10]  # empty
    batch = jax.tree.map(jnp.asarray, batch)
    config = models.from_dict({"family": "internvl", "size": "tiny", "depth": 1})
    model = models.bind(config, models.create(config, jax.random.key(0)))
    features = jax.device_get(HARDEST.features(model, batch, None))
    mined = HARDEST.mine(features, HARDEST.prepare(batch))
    texts = np.unique(batch["positive"], axis=0, return_inverse=True)[1].ravel()
    usable = (batch["positive"] > 0).sum(axis=1) != 2
    expected = by_hand(features["image"], features["text"], (batch["image_id"], texts), usable)
    for row in range(4):  # the first half is shown negatives
        np.testing.assert_array_equal(mined["matching"][row], batch["positive"][expected[row]])
    np.testing.assert_array_equal(mined["matching"][4:], batch["positive"][4:])
    np.testing.assert_array_equal(mined["match_labels"], [0, 0, 0, 0, 1, -100, 1, 1])
    # Where all captions belong to one image, the batch's own negative stays.
    alone = HARDEST.mine(features, HARDEST.prepare({**batch, "image_id": jnp.zeros(8, int)}))
    np.testing.assert_array_equal(alone["negative"], batch["negative"])


@pytest.mark.slow
def test_chunks_and_devices_mine_the_same():
    loss, metrics, gradient = gradients_test.compute(HARDEST, TRAINABLE, None, 1)
    other = gradients_test.compute(HARDEST, TRAINABLE, (1, 4, 2), 2)
    released, _, _ = gradients_test.compute(Generative(), TRAINABLE, None, 1)
    assert other[0] == pytest.approx(loss, abs=1e-5) != released
    assert metrics["itm"] == pytest.approx(other[1]["itm"], abs=1e-5)
    for path, reference in gradient.items():
        bound = 1e-4 * np.abs(reference).max() + 2e-6
        assert np.abs(other[2][path] - reference).max() <= bound, path


def test_unknown_way_is_refused():
    with pytest.raises(ValueError, match='itm_negatives must be "random" or "hardest"'):
        Generative(itm_negatives="hard")
