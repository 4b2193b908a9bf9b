"""LLaMA over `tensor`: its residual stream is spread over positions, and nothing else changes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import models
from internvl_jax.kernels import Causal
from internvl_jax.objectives import Language
from internvl_jax.rules import flatten
from internvl_jax.sharding import make_mesh, place_batch

ROWS, WIDTH = 8, 32


def config(**fields):
    return models.from_dict({"family": "language", "size": "tiny"} | fields)


def step(config, sizes, length):
    """Loss and gradients, and the text of their program, on a mesh."""
    tokens = np.random.default_rng(0).integers(1, 600, (ROWS, length)).astype(np.int32)
    tokens[::2, length - 3 :] = 0
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    with jax.set_mesh(mesh):
        params = models.create(config, jax.random.key(0))
        batch = place_batch({"tokens": tokens})

        def loss(params):
            return Language(vocabulary_slices=3)(models.bind(config, params), batch)[0]

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        value, gradients = program(params)
        return float(value), jax.device_get(flatten(gradients)), program.as_text()


@pytest.mark.parametrize("remat", ["full", "projections", "dots"])
@pytest.mark.parametrize(("sizes", "length"), [((2, 2, 2), 12), ((1, 1, 2), 12), ((1, 4, 2), 13)])
def test_a_step_over_tensor_equals_one_on_a_device(sizes, length, remat):
    expected, reference, _ = step(config(), (1, 1, 1), length)
    value, gradients, _ = step(config(remat=remat), sizes, length)
    assert value == pytest.approx(expected, abs=2e-5)
    for path, wanted in reference.items():
        bound = 1e-4 * np.abs(wanted).max() + 1e-6
        np.testing.assert_allclose(gradients[path], wanted, atol=bound, err_msg=path)


def sums(text, rows, length):
    """How many all-reduces and reduce-scatters of a whole or spread residual stream there are."""
    found = re.findall(r"= f32\[([\d,]+)\]\S* (all-reduce|reduce-scatter)\(", text)
    kinds = {f"{rows},{length},{WIDTH}": "whole", f"{rows},{length // 2},{WIDTH}": "spread"}
    return [(kinds[shape], kind) for shape, kind in found if shape in kinds]


@pytest.mark.parametrize(("remat", "scatters"), [("full", 5), ("dots", 4)])
def test_a_layer_scatters_what_tensor_adds_up(remat, scatters):
    """Two sums forward and two backward, as in Korthikanti et al., Figure 5; `full` makes the first
    again for its gradient. The layers are scanned: the program holds one."""
    text = step(config(remat=remat), (1, 4, 2), 12)[2]
    assert sums(text, ROWS // 4, 12) == [("spread", "reduce-scatter")] * scatters
    # Positions that do not divide are not spread.
    text = step(config(remat=remat), (1, 4, 2), 13)[2]
    assert {kind for _, kind in sums(text, ROWS // 4, 13)} == {"all-reduce"}


def test_hidden_states_come_back_whole():
    one = config()
    x = np.random.default_rng(1).normal(size=(ROWS, 12, WIDTH)).astype(np.float32)

    def states(sizes):
        mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
        with jax.set_mesh(mesh):
            llama = models.bind(one, models.create(one, jax.random.key(0))).llama
            run = jax.jit(lambda x: llama(x, mask=Causal(), hidden_states=True))
            hidden, stacked = run(place_batch(jnp.asarray(x)))
            assert hidden.sharding.spec[1] is None and stacked.sharding.spec[2] is None
            return np.asarray(hidden), np.asarray(stacked)

    for got, expected in zip(states((1, 4, 2)), states((1, 1, 1)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
