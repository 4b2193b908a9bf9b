"""The ring's log-sum-exps against the matrix itself, on one device and around several."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import ring
from internvl_jax.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)


def whole(a, b):
    scores = a @ b.T
    return jax.nn.logsumexp(scores, 1), jax.nn.logsumexp(scores, 0), jnp.argmax(scores, 1)


# 1032 rows on one device need three tiles; on eight devices each has one of 129 rows.
@pytest.mark.parametrize("mesh", [None, (1, 8, 1), (2, 2, 2)])
def test_log_sum_exps_and_their_gradients(mesh):
    rows = 1032
    a, b = RNG.normal(size=(2, rows, 6)).astype(np.float32)
    b[100] = b[900]  # of two equal columns the first counts
    weights = RNG.normal(size=(2, rows)).astype(np.float32)

    def total(function, a, b):
        by_rows, by_columns, largest = function(a, b)
        value = jnp.sum(weights[0] * by_rows) + jnp.sum(weights[1] * by_columns)
        return value, (by_rows, by_columns, largest)

    expected = jax.value_and_grad(lambda *x: total(whole, *x), (0, 1), has_aux=True)(a, b)
    mesh = mesh and make_mesh(*mesh)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        inputs = (a, b) if mesh is None else jax.device_put((a, b), batch_sharding(mesh))
        run = jax.value_and_grad(lambda *x: total(ring.log_sum_exps, *x), (0, 1), has_aux=True)
        got = jax.device_get(jax.jit(run)(*inputs))
    np.testing.assert_array_equal(got[0][1][2], expected[0][1][2])
    assert (got[0][1][2] != 900).all()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_no_array_of_the_program_has_the_size_of_the_matrix():
    mesh = make_mesh(1, 8, 1)
    rows, width = 4096, 8

    def loss(a, b):
        by_rows, by_columns, _ = ring.log_sum_exps(a, b)
        return jnp.sum(by_rows + by_columns)

    def temporaries(rows):
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=batch_sharding(mesh))
            compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    once, twice = temporaries(rows), temporaries(2 * rows)
    # A device's rows of the matrix alone would take rows²·4/8 bytes, four times as many for twice
    # the batch.
    assert once < rows**2 * 4 / 8 and twice < 2.2 * once
