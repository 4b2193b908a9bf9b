"""Segmentation on the embedded scenes and on files, and its parts against plain references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from internvl_jax.data import scenes
from internvl_jax.evals import (
    evaluator,
    files,
    scores,
    segmentation,
    segmentation_data,
    segmentation_recipe,
)
from internvl_jax.evals import segmentation_heads as heads


@pytest.mark.slow
def test_a_linear_layer_on_the_trained_tower_separates_shapes(figures):
    trained, untrained = figures("segmentation", test_images=60)
    assert trained["embedded.linear.miou"] >= 0.25 > 0.2 > untrained["embedded.linear.miou"]


@pytest.mark.slow
def test_upernet_finds_more_shapes_on_the_trained_tower(figures):
    """A head of its own depth learns some from an untrained tower's features too."""
    trained, untrained = figures(
        "segmentation", head="upernet", channels=32, steps=300, rate=5e-3, train_images=200,
        test_images=40, batch_size=8,
    )  # fmt: skip
    assert trained["embedded.upernet.miou"] >= 0.22 > 0.21 > untrained["embedded.upernet.miou"]


@pytest.mark.slow
def test_upernet_learns_with_a_tuned_tower(demo):
    """Held to the background alone: a tower that is tuned learns as much from random weights.

    Of 60, 100 and 120 updates with layer decays of 0.9 and 0.2, none told the two towers apart by
    more than 0.013 of mIoU.
    """
    options = dict(head="upernet", tune=True, channels=8, steps=20, warmup=2, test_images=4,
                   train_images=16, batch_size=8, layer_decay=0.9)  # fmt: skip
    one = evaluator.build({"segmentation": options})["segmentation"]
    found = dict(one.run(demo.config, demo.params))
    assert found["embedded.upernet_tuned.pixel_accuracy"] > 0.5  # the background


def test_mean_iou_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 6, 5000), rng.integers(0, 6, 5000)
    counts = scores.confusion(labels, predicted, 7)  # the last class does not occur
    assert np.array_equal(counts[:6, :6], metrics.confusion_matrix(labels, predicted))
    wanted = metrics.jaccard_score(labels, predicted, average="macro")
    assert scores.mean_iou(counts) == pytest.approx(wanted)


def test_windows_cover_an_image_and_end_with_it():
    assert segmentation.windows(504, 504, 322) == [0]
    assert segmentation.windows(683, 504, 322) == [0, 179]
    assert segmentation.windows(1200, 504, 322) == [0, 322, 644, 696]


def test_ignored_pixels_do_not_count():
    logits = jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    labels = np.zeros((1, 4, 4), np.int32)
    labels[0, 2:] = segmentation_data.IGNORED
    found = segmentation.cross_entropy(logits, labels)
    wanted = -jax.nn.log_softmax(logits)[0, :2, :, 0].mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_layer_decay_counts_from_the_top():
    learnt = {
        "vit": {"patch": jnp.ones(2), "blocks": {"w": jnp.ones((3, 4, 4)), "b": jnp.ones((3, 4))}},
        "head": {"w": jnp.ones((2, 2))},
    }
    found = segmentation_recipe.layer_scales(learnt, 3, 0.5)
    assert found["vit"]["patch"] == 0.0625 and found["head"]["w"] == 1
    assert found["vit"]["blocks"]["w"].ravel().tolist() == [0.125, 0.25, 0.5]
    recipe = segmentation_recipe.Recipe(
        rate=1.0, steps=10, warmup=0, weight_decay=0.1, layer_decay=0.5
    )
    tx = segmentation_recipe.optimizer(learnt, 3, recipe)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, learnt), tx.init(learnt), learnt)
    assert np.all(np.asarray(updates["vit"]["blocks"]["b"]) == 0)  # vectors have no weight decay
    np.testing.assert_allclose(updates["vit"]["blocks"]["w"][:, 0, 0], [-0.0125, -0.025, -0.05])


@pytest.mark.parametrize("size", heads.POOLS)
def test_adaptive_pooling_follows_its_definition(size):
    x = np.random.default_rng(0).normal(size=(2, 7, 9, 3)).astype(np.float32)
    found = heads.pooled(x, size)
    for i in range(size):
        for j in range(size):
            rows = slice(i * 7 // size, -(-(i + 1) * 7 // size))
            columns = slice(j * 9 // size, -(-(j + 1) * 9 // size))
            wanted = x[:, rows, columns].mean(axis=(1, 2))
            np.testing.assert_allclose(found[:, i, j], wanted, atol=1e-5)


def test_ade20k_is_read_scaled_and_cropped(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("training", 3), ("validation", 2)):
        for kind in ("images", "annotations"):
            (tmp_path / "ade20k" / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = rng.integers(0, 151, (40, 60), np.uint8)
            pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"ade20k/images/{split}/{number}.jpg")
            Image.fromarray(labels).save(tmp_path / f"ade20k/annotations/{split}/{number}.png")
    train, test = segmentation_data.ade20k(tmp_path, "ade20k", 56, 14, partial=True)
    pixels, labels = test[0]
    assert pixels.shape == (56, 84, 3) and labels.shape == (40, 60)
    assert set(np.unique(labels)) <= {*range(150), 255}
    for _ in range(5):
        pixels, labels = segmentation_data.crop_of(*train[0], 56, rng, embedded=False)
        assert pixels.shape == (56, 56, 3) and labels.shape == (56, 56)
        assert pixels.dtype == np.uint8 and labels.max() <= 255
    with pytest.raises(files.DatasetError, match="5 images where the protocol has 22210"):
        segmentation_data.ade20k(tmp_path, "ade20k", 56, 14, partial=False)


def test_embedded_labels_lie_where_the_shapes_are():
    ((pixels, labels),) = segmentation_data.scene_set("test_single", 1, 96)
    one = scenes.scene("test_single", 0).objects[0]
    assert set(np.unique(labels)) == {0, 1 + scenes.SHAPES.index(one.shape)}
    color = pixels[labels > 0].mean(axis=0) / 255
    assert np.abs(color - scenes.RGB[one.color]).max() < 0.15
