"""Every implementation of attention computes what the definition says, for every mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import kernels
from internvl_jax.kernels import reference
from internvl_jax.kernels.attention import IMPLEMENTATIONS

BATCH, LENGTH, QUERIES = 3, 11, 4
MODES = np.array([kernels.ITM, kernels.ITC, kernels.ITG], np.int32)


def valid() -> np.ndarray:
    rows = np.ones((BATCH, LENGTH), bool)
    rows[1, 8:] = False
    rows[2, 5] = False
    return rows


def allowed(name: str, b: int, t: int, s: int) -> bool:
    """What each mask lets query t of row b see, written from the table in spec form."""
    both_queries = t < QUERIES and s < QUERIES
    both_text = t >= QUERIES and s >= QUERIES
    if name == "full":
        return True
    if name == "causal":
        return s <= t
    if name == "prefix":
        return both_queries or s <= t
    if name == "separate":
        return both_queries or (both_text and s <= t)
    if name == "keys":
        return bool(valid()[b, s])
    if name == "middleware":
        return allowed(["full", "separate", "prefix"][MODES[b]], b, t, s)
    return allowed("causal", b, t, s) and allowed("keys", b, t, s)


MASKS = {
    "full": kernels.Full(),
    "causal": kernels.Causal(),
    "prefix": kernels.Prefix(QUERIES),
    "separate": kernels.Separate(QUERIES),
    "keys": kernels.Keys(jnp.asarray(valid())),
    "middleware": kernels.Middleware(QUERIES, jnp.asarray(MODES)),
    "causal & keys": kernels.Causal() & kernels.Keys(jnp.asarray(valid())),
}


def by_hand(query, key, value, visible) -> np.ndarray:
    """Softmax attention in float64, one row at a time."""
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, length, heads, dim))
    for b, t, h in itertools.product(range(batch), range(length), range(heads)):
        seen = np.flatnonzero(visible[b, t])
        if len(seen):
            scores = key[b, seen, h // group] @ query[b, t, h] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ value[b, seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_follows_its_definition(implementation, mask, kv_heads):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(BATCH, LENGTH, 4, 8))
    key, value = rng.normal(size=(2, BATCH, LENGTH, kv_heads, 8))
    visible = np.array(
        [
            [[allowed(mask, b, t, s) for s in range(LENGTH)] for t in range(LENGTH)]
            for b in range(BATCH)
        ]
    )
    inputs = (jnp.asarray(a, jnp.float32) for a in (query, key, value))
    got = kernels.attention(*inputs, mask=MASKS[mask], implementation=implementation)
    np.testing.assert_allclose(got, by_hand(query, key, value, visible), atol=2e-6)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_agree_with_the_reference(mask):
    rng = np.random.default_rng(1)
    query, key, value = (
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, 4, 8)), jnp.float32) for _ in range(3)
    )

    def gradients(implementation):
        def loss(query, key, value):
            out = kernels.attention(
                query, key, value, mask=MASKS[mask], implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    for got, expected in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_that_sees_nothing_gives_zeros_and_finite_gradients(implementation):
    mask = kernels.Keys(jnp.zeros((1, 3), bool))
    x = jnp.ones((1, 3, 2, 4))

    def loss(x):
        return jnp.sum(kernels.attention(x, x, x, mask=mask, implementation=implementation))

    value, gradient = jax.value_and_grad(loss)(x)
    assert value == 0.0
    assert np.isfinite(gradient).all()


def test_probabilities_sum_to_one_over_what_is_visible():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, 4, 8)), jnp.float32)
    weights = reference.probabilities(x, x, mask=MASKS["causal & keys"])
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert not np.any(np.asarray(weights)[1, :, :, 8:])


def test_bfloat16_stays_close_to_float32():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 65, 2, 32)), jnp.float32)
    exact = kernels.attention(x, x, x)
    half = kernels.attention(*(x.astype(jnp.bfloat16),) * 3)
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - exact).max() < 0.05


def test_errors_name_the_choice():
    x = jnp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match="choose from"):
        kernels.attention(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads do not divide over 2"):
        kernels.attention(x, x[:, :, :2], x[:, :, :2])
