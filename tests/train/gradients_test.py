"""Chunks give the loss, metrics and gradient of the whole batch, whatever the mesh."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from internvl_jax import models, objectives, rules
from internvl_jax.objectives import OBJECTIVES
from internvl_jax.sharding import batch_sharding, make_mesh
from internvl_jax.train import flops
from internvl_jax.train.gradients import forward_passes, value_and_grad
from tests import objectives_test
from tests.objectives_test import make_batch

# objective → options, a trainable part, and the options that change how it is computed.
CASES = {
    "language": ({}, ".*", {"vocabulary_slices": 3}),
    "contrastive": ({"mask_ratio": 0.5}, ".*", {"ring": True}),
    "generative": (
        {"label_smoothing": 0.1},
        r"queries|cross/.*|pool2/.*|match_head/.*|logit_scale",
        {"ring": True, "vocabulary_slices": 3},
    ),
    "retrieval": ({}, r"pool/.*|cross/.*|logit_scale", {}),
    "instruct": ({}, r"projector/.*|llm/.*", {"vocabulary_slices": 3}),
}


def several(batch, copies):
    return {name: np.tile(x, (copies, *[1] * (x.ndim - 1))) for name, x in batch.items()}


def compute(objective, trainable, sizes, chunks, copies=1, **options):
    name = next(n for n, kind in OBJECTIVES.items() if kind is type(objective))
    family = objectives_test.FAMILY.get(name, "internvl")
    # Random masks and dropped branches must be the same for an example in any chunk.
    drop = {"drop_path": 0.5, "drop_path_schedule": "uniform"} if family != "language" else {}
    config = models.from_dict({"family": family, "size": "tiny", "depth": 1, **drop})
    batch = several(make_batch(name), copies)
    params = jax.device_get(models.create(config, jax.random.key(0)))
    mesh = sizes and make_mesh(*sizes)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if mesh is not None:
            params = jax.device_put(params, models.shardings(config, mesh))
            batch = jax.device_put(batch, batch_sharding(mesh))
        learned, frozen = rules.partition(params, trainable)
        bind = functools.partial(models.bind, config)
        keys = jax.random.split(jax.random.key(1), copies * objectives_test.ROWS)
        if mesh is not None:
            keys = jax.device_put(keys, batch_sharding(mesh))
        step = functools.partial(value_and_grad, objective, bind, chunks=chunks, **options)
        (loss, metrics), gradient = jax.device_get(jax.jit(step)(learned, frozen, batch, keys))
        return loss, metrics, rules.flatten(gradient)


# The others take the same way through `gradients`, with larger models to compile.
QUICK = ("language", "contrastive")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CASES]
)
def test_chunks_equal_one_pass(name):
    options, trainable, split = CASES[name]
    kind = OBJECTIVES[name]
    loss, metrics, gradient = compute(kind(**options), trainable, None, 1)
    other = compute(kind(**options, **split), trainable, (1, 4, 2), 2)
    assert other[0] == pytest.approx(loss, abs=1e-5)
    assert other[1].keys() == metrics.keys()
    for metric, value in metrics.items():
        assert other[1][metric] == pytest.approx(value, abs=1e-5), metric
    assert other[2].keys() == gradient.keys()
    for path, reference in gradient.items():
        bound = 1e-4 * np.abs(reference).max() + 2e-6
        assert np.abs(other[2][path] - reference).max() <= bound, path


@pytest.mark.parametrize("held", [0, 1, 2])
def test_features_of_several_chunks_at_once_stay_with_their_examples(held):
    """Eight chunks: their features come in two passes, each example has its own random mask."""
    assert forward_passes(8, rows=2) == forward_passes(7, rows=2) == 2
    objective = OBJECTIVES["contrastive"](mask_ratio=0.5)
    loss, _, gradient = compute(objective, ".*", None, 1, copies=2)
    other, _, parts = compute(objective, ".*", None, 8, copies=2, held_towers=held)
    assert other == pytest.approx(loss, abs=1e-5)
    for path, reference in gradient.items():
        bound = 1e-4 * np.abs(reference).max() + 2e-6
        assert np.abs(parts[path] - reference).max() <= bound, path


@pytest.mark.parametrize(
    ("chunks", "rows", "passes"), [(4, 128, 1), (9, 64, 2), (7, 80, 2), (19, 32, 4), (7, 1, 7)]
)
def test_passes_for_the_features_are_few_equal_and_no_larger_than_five_chunks(chunks, rows, passes):
    found = forward_passes(chunks, rows)
    assert found == passes
    assert chunks * rows % found == 0
    assert chunks * rows // found <= 5 * rows


def tower_work(objective, trainable, chunks, held_towers=1):
    """FLOPs of a step of InternVL-G, tiny, and of its vision tower forward over the batch."""
    config = models.from_dict({"family": "internvl", "size": "tiny", "depth": 1})
    batch, params = (
        make_batch("generative"),
        models.create(config, jax.random.key(0)),
    )
    keys = jax.random.split(jax.random.key(1), objectives_test.ROWS)
    bind = functools.partial(models.bind, config)
    learned, frozen = rules.partition(params, trainable)
    options = {"chunks": chunks, "held_towers": held_towers}
    step = functools.partial(value_and_grad, objective, bind, **options)
    tower = flops.count(lambda p: bind(p).vision(batch["image"]), params)
    return flops.count(step, learned, frozen, batch, keys), tower


@pytest.mark.parametrize(
    ("mining", "held", "share"), [("random", 1, 0.75), ("random", 0, 1.0), ("hardest", 1, 1.0)]
)
def test_a_frozen_tower_works_once_and_a_trained_one_again_where_its_chunk_is_not_held(
    mining, held, share
):
    objective = OBJECTIVES["generative"](itm_negatives=mining)

    def again(trainable):  # what is computed for the features
        whole, _ = tower_work(OBJECTIVES["generative"](), trainable, 1)
        parts, tower = tower_work(objective, trainable, 4, held)
        return parts - whole, tower

    trained, tower = again("queries|vit/.*")
    frozen, _ = again("queries")
    assert trained - frozen == pytest.approx(share * tower, rel=0.01)


def test_towers_that_share_no_output_hold_their_activations_one_after_the_other():
    class Together(objectives.Contrastive):
        separate = ()

    config = models.from_dict({"family": "internvl", "size": "tiny", "depth": 16})
    params = models.create(config, jax.random.key(0))
    batch = several(make_batch("contrastive"), 8)
    keys = jax.random.split(jax.random.key(1), len(batch["image"]))
    bind = functools.partial(models.bind, config)

    def memory(objective):
        step = functools.partial(value_and_grad, objective, bind, chunks=2, held_towers=0)
        step = jax.jit(step)
        return step.lower(params, {}, batch, keys).compile().memory_analysis().temp_size_in_bytes

    assert memory(objectives.Contrastive()) < 0.75 * memory(Together())
