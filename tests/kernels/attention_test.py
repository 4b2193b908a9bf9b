"""Every implementation of attention computes what the definition says, for every mask."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from internvl_jax import kernels, sharding
from internvl_jax.kernels import reference
from tests.kernels.definition import (
    KERNELS,
    MASKS,
    NAMES,
    QUICK,
    allowed,
    attention_by,
    by_hand,
    check,
    computed,
    cut,
    inputs,
    mask_of,
    suite,
)


@pytest.mark.parametrize(
    "implementation,mask",
    [
        pytest.param(name, mask, marks=[pytest.mark.slow] * (name in KERNELS))
        if mask not in QUICK
        else (name, mask)
        for name, mask in itertools.product(NAMES, MASKS)
    ],
)
def test_attention_and_its_gradients_follow_the_definition(implementation, mask, monkeypatch):
    cut(monkeypatch)
    suite(implementation, mask, 150, 150)


@pytest.mark.parametrize("implementation", NAMES)
def test_one_key_head_and_bfloat16(implementation):
    suite(implementation, "causal", 7, 7, jnp.bfloat16, heads=3, key_heads=1)


@pytest.mark.parametrize(
    "implementation,dim", [("pallas_tpu", 64), ("pallas_tpu", 128), ("xla", 64), ("reference", 64)]
)
def test_under_a_mesh_each_device_does_its_part(implementation, dim):
    arrays = inputs(9, 9, batch=4, dim=dim)
    lengths = np.array([9, 0, 3, 8], np.int32)
    mask = kernels.Causal() & kernels.Lengths(jnp.asarray(lengths))
    visible = np.tril(np.ones((9, 9), bool)) & (np.arange(9) < lengths[:, None, None])
    expected = by_hand(*arrays, visible)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        arrays = [jax.device_put(a, P(("replica", "fsdp"), None, "tensor", None)) for a in arrays]

        def attend(query, key, value):
            def layer(carry, _):
                out = kernels.attention(
                    carry, key, value, mask=mask, implementation=implementation
                )
                return carry, out

            return jax.lax.scan(jax.checkpoint(layer), query, None, length=1)[1][0]

        check(computed(attend, *arrays), expected, jnp.float32)


@pytest.mark.parametrize("implementation", NAMES)
def test_a_row_that_sees_nothing_gives_zeros_and_no_gradient(implementation):
    attend = attention_by(implementation, kernels.Keys(jnp.zeros((3, 5), bool)))
    for result in computed(attend, *inputs(5, 5, dim=128)):
        assert not result.any()


def test_probabilities_sum_to_one_over_what_is_visible():
    query, key, *_ = inputs(11, 11)
    weights = reference.probabilities(query, key, mask=mask_of("causal & keys", 11, 11))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert not np.any(np.asarray(weights)[1, :, :, 8:])


@pytest.mark.parametrize("mask", MASKS)
def test_no_tile_with_something_visible_is_passed_over(mask):
    length, size = 24, 8
    made, visible = mask_of(mask, length, length), allowed(mask, length, length)
    for b, i, j in itertools.product(range(3), range(0, length, size), range(0, length, size)):
        arrays = []
        for array, along in zip(jax.tree.leaves(made), made.along, strict=True):
            part = np.asarray(array[b]).astype(int)
            if along != kernels.masks.ROW:
                start = i if along == kernels.masks.QUERY else j
                part = part[start : start + size]
                part = kernels.masks.Span(part.min(), part.max())
            arrays.append(part)
        spans = kernels.masks.Span(i, i + size - 1), kernels.masks.Span(j, j + size - 1)
        some = made.replace(arrays).some(*spans)
        tile = visible[b, i : i + size, j : j + size]
        assert bool(some) >= tile.any()
        assert made.never(*spans) <= (not some)


def test_errors_name_the_choice():
    x = jnp.ones((1, 2, 3, 4))
    with pytest.raises(ValueError, match="choose from"):
        kernels.attention(x, x, x, implementation="flash")
    with pytest.raises(ValueError, match="3 query heads do not divide over 2"):
        kernels.attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="cuDNN needs an NVIDIA GPU, this is cpu"):
        kernels.attention(x, x, x, implementation="cudnn")
    with pytest.raises(ValueError, match="head_dim of 64 or 128, not 4"):
        kernels.attention(x, x, x, implementation="pallas_tpu")
