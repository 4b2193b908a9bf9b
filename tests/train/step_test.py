"""The train step on the real tiny model: compiles once, learns, skips what is not finite."""

import functools

import jax
import numpy as np
import pytest

from internvl_jax import rules, sharding
from internvl_jax.models import config as models
from internvl_jax.models import init
from internvl_jax.objectives import Language
from internvl_jax.train import loop, optimizer
from internvl_jax.train import state as states
from internvl_jax.train.step import example_keys, make_train_step

SETTINGS = dict(
    learning_rate=((".*", 3e-3),),
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    no_decay="",
    clip_norm=1.0,
    layer_decay=(),
)
MODEL = models.from_dict(dict(family="language", size="tiny", depth=1, width=16, mlp_dim=16))


def batch(number, scale=1.0):
    tokens = np.random.default_rng(number).integers(3, 900, (8, 12)).astype(np.int32)
    return {"tokens": tokens, "scale": np.full((8,), scale, np.float32)}


class Scaled(Language):
    """The language loss times a number of the batch, with the first example's draw as a metric."""

    def outputs(self, model, batch, keys):
        draw = jax.vmap(jax.random.uniform)(keys)
        return {**super().outputs(model, batch, keys), "draw": draw}

    def loss(self, model, outputs, batch):
        loss, metrics = super().loss(model, outputs, batch)
        return loss * batch["scale"].mean(), {**metrics, "draw": outputs["draw"].min()}


@pytest.fixture(scope="module")
def mesh():
    mesh = sharding.make_mesh(fsdp=2, replica=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def parameters():
    return jax.device_get(init.create(MODEL, jax.random.key(0)))


@functools.cache
def compiled(trainable, seed, chunks):
    learned, _ = rules.partition(parameters(), trainable)
    tx, learning_rate = optimizer.make_optimizer(SETTINGS, learned, steps=100)
    bind = functools.partial(init.bind, MODEL)
    step = make_train_step(
        Scaled(), bind, tx, seed=seed, chunks=chunks, learning_rate=learning_rate
    )
    return jax.jit(lambda p: states.create(p, trainable, tx)), step


def build(mesh, trainable=".*", seed=0, chunks=1):
    """A new state and the step for it, compiled once for all tests."""
    shapes = states.on_mesh(init.abstract(MODEL), mesh)
    params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), parameters(), shapes)
    make_state, step = compiled(trainable, seed, chunks)
    return make_state(params), step


@pytest.mark.parametrize("chunks", [1, 2])
def test_compiles_once_and_learns(mesh, chunks):
    state, step = build(mesh, chunks=chunks)
    losses = []
    for _ in range(5):
        state, metrics = step(state, loop.to_devices(batch(0), mesh))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert int(state.step) == 5
    assert float(metrics["learning_rate"]) == pytest.approx(3e-3)
    assert float(metrics["grad_norm"]) > 0


def test_frozen_parameters_have_no_moments_and_do_not_move(mesh):
    state, step = build(mesh, r"llama/blocks/mlp/.*")
    total = sum(x.size for x in jax.tree.leaves(state.params))
    trainable = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert trainable == 3 * 16 * 16
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * trainable + 1
    before = jax.device_get(state.params)
    state, _ = step(state, loop.to_devices(batch(0), mesh))
    after = jax.device_get(state.params)
    moved = {
        path
        for path, x in rules.flatten(after).items()
        if not np.array_equal(x, rules.flatten(before)[path])
    }
    assert moved == {f"llama/blocks/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    assert sum(x.size for x in jax.tree.leaves(after)) == total


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_only_the_counters(mesh, bad):
    state, step = build(mesh)
    state, _ = step(state, loop.to_devices(batch(0), mesh))
    before = jax.device_get((state.trainable, state.opt_state))
    for expected in (1, 2):
        state, metrics = step(state, loop.to_devices(batch(1, bad), mesh))
        assert int(metrics["nonfinite_in_a_row"]) == int(metrics["skipped"]) == expected
    jax.tree.map(
        np.testing.assert_array_equal, before, jax.device_get((state.trainable, state.opt_state))
    )
    state, metrics = step(state, loop.to_devices(batch(2), mesh))
    assert int(state.step) == 4
    assert int(metrics["nonfinite_in_a_row"]) == 0 and int(metrics["skipped"]) == 2
    assert step._cache_size() == 1


def test_randomness_depends_on_seed_and_step_alone(mesh):
    def draws(seed):
        state, step = build(mesh, seed=seed)
        found = []
        for number in range(3):
            state, metrics = step(state, loop.to_devices(batch(number), mesh))
            found.append(float(metrics["draw"]))
        return found

    first = draws(0)
    assert draws(0) == first
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        keys = [example_keys(seed, i, batch(0)) for seed in (0, 1) for i in range(3)]
        expected = [float(jax.vmap(jax.random.uniform)(of_rows).min()) for of_rows in keys]
    assert first == expected[:3] and len(set(expected)) == 6
