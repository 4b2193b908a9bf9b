"""Probes on the demo model, with floors, and their parts against the formulas."""

import jax
import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import scenes
from internvl_jax.evals import evaluator, files, heads, probe
from internvl_jax.models.attention import AttentionPool


@pytest.mark.slow
def test_nearest_neighbours_know_more_after_training(figures):
    trained, untrained = figures("knn", train_images=500)
    assert trained["scenes.top1"] >= 0.75 > 0.65 > untrained["scenes.top1"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "floor"), [("linear_probe", 0.6), ("attention_probe", 0.55)])
def test_heads_on_the_trained_tower_are_better(figures, name, floor):
    trained, untrained = figures(name, epochs=5)
    assert trained["scenes.top1"] >= floor > untrained["scenes.top1"] + 0.1


def test_attention_pooling_is_that_of_the_models():
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    weights = heads.init_attention_pool(jax.random.key(1), 12)
    model = AttentionPool(12, 12, 3, "vit_wide", jax.random.key(2))
    for name in ("q", "k", "v", "proj"):
        layer = getattr(model, name)
        layer.kernel[...] = weights[name]["kernel"]
        layer.bias[...] = weights[name]["bias"]
    np.testing.assert_allclose(heads.attention_pool(weights, x, 3), model(x), atol=1e-5)


def test_batch_norm_keeps_unbiased_running_statistics():
    x = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    weights, state = heads.init_batch_norm(4)
    y, new = heads.batch_norm(weights, state, x, True)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), atol=1e-4)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-4)
    y, same = heads.batch_norm(weights, new, x, False)
    np.testing.assert_allclose(y, (x - new["mean"]) / np.sqrt(new["var"] + 1e-6), rtol=1e-4)
    assert np.array_equal(same["mean"], new["mean"])


def test_mixes_keep_the_share_of_every_class():
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    pixels[2:] = 200
    targets = np.eye(2)[[0, 0, 1, 1]]
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(20):
        mixed, soft = probe.mix(rng, pixels, targets)
        np.testing.assert_allclose(soft.sum(axis=1), 1)
        np.testing.assert_allclose(mixed[2:].mean(axis=(1, 2, 3)) / 200, soft[2:, 1], atol=5e-3)
        kinds.add(len(np.unique(mixed[2])) > 1)
    assert kinds == {True, False}


def test_only_the_classes_of_a_subset_compete(tmp_path, demo):
    """An ImageNet of six classes, and an ImageNet-A of two: one of them is always right there."""
    wnids = [f"n{number:08d}" for number in range(6)]
    for folder, chosen in (("imagenet1k/train", range(6)), ("imagenet1k/val", range(6)),
                           ("imagenet-a", (1, 4))):  # fmt: skip
        for label in chosen:
            index = scenes.SEEN_PAIRS.index(scenes.SEEN_PAIRS[label * 7])
            for turn in range(4):
                one = scenes.scene("test_single", index + turn * len(scenes.SEEN_PAIRS))
                path = tmp_path / folder / wnids[label] / f"{turn}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(scenes.render([one])[0]).save(path)
    options = dict(dataset="imagenet1k", root=str(tmp_path), batch_size=24, partial=True)
    one = evaluator.build({"knn": options})["knn"]
    found = dict(one.run(demo.config, demo.params))
    assert set(one.details) == {"imagenet1k", "imagenet-a"}
    assert one.details["imagenet-a"]["predicted"].max() <= 1
    assert found["imagenet1k.top1"] == found["imagenet-a.top1"] == 1.0  # they learnt these pictures
    learnt = evaluator.build({"linear_probe": options | {"augment": False, "epochs": 30}})
    assert dict(learnt["linear_probe"].run(demo.config, demo.params))["imagenet1k.top1"] >= 0.8
    with pytest.raises(files.DatasetError, match="24 images where the protocol has 50000"):
        dict(evaluator.build({"knn": options | {"partial": False}})["knn"].run(demo.config, {}))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown probe 'svm'; there are linear"):
        evaluator.build({"linear_probe": {"kind": "svm"}})
