"""Attention by XLA where a CPU computes it in parts of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import kernels


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_scores_beyond_the_cache_give_what_the_reference_gives(batch):
    # Scores of 1025² × 2 heads are 8.4 MB for each example.
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (jax.random.normal(k, (batch, 1025, 2, 16)) for k in keys)

    def run(implementation):
        def loss(query, key, value):
            mixed = kernels.attention(query, key, value, implementation=implementation)
            return jnp.sum(mixed * weight), mixed

        (_, mixed), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
            query, key, value
        )
        return mixed, *gradients

    for ours, reference in zip(run("xla"), run("reference"), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-6)
