"""A packed batch trains exactly as the same conversations in rows of their own."""

import functools

import jax
import numpy as np
import optax
import pytest

from internvl_jax import configuration, models
from internvl_jax.data import pipelines, sources
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.objectives import Instruct
from internvl_jax.rules import flatten
from internvl_jax.sharding import batch_sharding, make_mesh
from internvl_jax.train import flops
from internvl_jax.train import state as states

CONFIG = models.from_dict({"family": "chat", "size": "tiny", "image_size": 32})
OBJECTIVE = Instruct()


@pytest.fixture(scope="module")
def batches():
    """(packed, in rows of their own), with the place of each of the latter in the former."""
    def build(rows, length, packing):
        return pipelines.build(
            task="instruct", sources=((sources.EmbeddedScenes("train", 200, 32), 1.0),),
            batch_size=rows, image_size=32, text_length=length, seed=1, tokenizer=Tokenizer(),
            template="brief", num_image_tokens=CONFIG.tokens_per_image, packing=packing,
        )

    packed, alone = build(8, 192, 3), build(24, 72, 0)
    places, numbers = {}, {name: row for row, name in enumerate(alone.ids(0))}
    for row, names in enumerate(packed.ids(0)):
        for segment, name in enumerate(names.split("+"), start=1):
            places[numbers[name]] = row, segment
    assert len(places) == 24
    return packed.batch(0), alone.batch(0), places


@pytest.fixture(scope="module")
def params():
    return jax.device_get(models.create(CONFIG, jax.random.key(0)))


def outputs(params, batch):
    return jax.jit(lambda p, b: OBJECTIVE.outputs(models.bind(CONFIG, p), b, None))(params, batch)


def test_every_token_has_the_loss_it_has_alone(batches, params):
    packed, alone, places = batches
    found, expected = outputs(params, packed), outputs(params, alone)
    compared = 0
    for row, (at, segment) in places.items():
        here = np.flatnonzero(packed["segments"][at] == segment)
        learnt = alone["labels"][row, 1 : len(here)] != -100
        for name in ("token_nll", "token_hit"):
            np.testing.assert_allclose(
                np.asarray(found[name])[at, here[:-1]][learnt],
                np.asarray(expected[name])[row, : len(here) - 1][learnt],
                atol=2e-5,
            )
        compared += learnt.sum()
    assert compared == (packed["labels"] != -100).sum() >= 48


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_loss_gradient_and_counts_are_those_of_the_conversations(batches, params, sizes):
    packed, alone, places = batches

    def of(params, batch):
        return OBJECTIVE(models.bind(CONFIG, params), batch)

    function = jax.jit(jax.value_and_grad(of, has_aux=True))
    (loss, metrics), gradient = function(params, alone)
    if sizes is not None:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(params, models.shardings(CONFIG, mesh))
            placed = jax.device_put(packed, batch_sharding(mesh))
            (found, figures), other = jax.device_get(function(sharded, placed))
    else:
        (found, figures), other = function(params, packed)
    assert float(found) == pytest.approx(float(loss), abs=2e-5)
    for path, reference in flatten(gradient).items():
        bound = 1e-4 * np.abs(reference).max() + 1e-5
        assert np.abs(flatten(other)[path] - reference).max() <= bound, path
    assert float(figures["conversations"]) == len(places) == float(figures["images"])
    assert float(figures["tokens"]) == float(metrics["tokens"]) == (alone["tokens"] != 0).sum()


def test_model_flops_are_split_between_squares_and_tokens(batches):
    packed, _, _ = batches
    config = configuration.load("stage3_sft:tiny", [])
    make = functools.partial(states.create, trainable=config.trainable, tx=optax.sgd(0.1))
    state = jax.eval_shape(make, models.abstract(CONFIG))
    batch = jax.device_put(packed, jax.devices()[0])
    per_square, per_token = flops.parts_of_step(config, state, batch)
    rows, length = packed["tokens"].shape
    whole = rows * (packed["image"].shape[1] * per_square + length * per_token)
    assert per_square > 0 and per_token > 0
    assert whole == pytest.approx(flops.of_step(config, state, batch))
