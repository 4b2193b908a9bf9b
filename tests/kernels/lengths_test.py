"""Attention at the model's lengths, on the simulated TPU, and through the TPU compiler."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from internvl_jax import kernels, sharding
from internvl_jax.plan import topology
from tests.kernels.definition import (
    KERNELS,
    MASKS,
    NAMES,
    QUICK,
    allowed,
    by_hand,
    check,
    computed,
    cut,
    inputs,
    mask_of,
    suite,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "queries,keys,mask",
    [
        (*lengths, mask)
        for lengths, masks in {
            (1, 1): QUICK, (7, 7): ("full", *QUICK), (99, 129): MASKS, (257, 257): ("full", *QUICK)
        }.items()
        for mask in masks
    ],
)  # fmt: skip
@pytest.mark.parametrize("implementation", NAMES)
def test_lengths_types_and_masks(implementation, queries, keys, mask, dtype):
    suite(implementation, mask, queries, keys, dtype, dim=128, heads=2, key_heads=1)


@pytest.mark.parametrize("mask", ["full", "causal", "causal & keys", "causal & segments"])
@pytest.mark.parametrize(
    "implementation,dim", [("short", 128), ("blocked", 64), ("blocked", 128), ("xla", 64)]
)
def test_many_blocks(implementation, dim, mask):
    suite(implementation, mask, 1025, 1025, dim=dim, heads=2, key_heads=1)


@pytest.mark.parametrize("mask", ["full", "causal & keys", "lengths", "causal & segments"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_simulated_tpu_finds_no_race_no_stray_read_and_no_use_of_unwritten_memory(
    kernel, mask, monkeypatch
):
    """Unwritten memory, output buffers included, holds NaN."""
    cut(monkeypatch)
    arrays = inputs(150, 150, heads=2, key_heads=1, dim=128)
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    attend = functools.partial(
        kernel.attention, mask=mask_of(mask, 150, 150), interpret=simulated
    )
    check(computed(attend, *arrays), by_hand(*arrays, allowed(mask, 150, 150)), jnp.float32)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def compiled(name, shape, key_heads, mask_of_arrays, dtype=jnp.bfloat16):
    """Text of attention and its gradients on one device of a topology, as nobody asked for it."""
    with topology.opened(name) as devices:
        mesh = sharding.make_mesh(devices=devices[:1])
        place = jax.sharding.NamedSharding(mesh, P())
        batch, length, _, dim = shape
        keys = (batch, length, key_heads, dim)
        shapes = (shape, dtype), (keys, dtype), ((batch, length), jnp.int32), ((batch,), jnp.int32)
        avals = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]

        def loss(query, key, valid, mode):
            mixed = kernels.attention(query, key, key, mask=mask_of_arrays(valid, mode))
            return jnp.sum(mixed.astype(jnp.float32))

        with jax.set_mesh(mesh):
            traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*avals)
            return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.parametrize("name", TPUS)
def test_the_compiler_takes_the_short_kernel_for_every_tpu(name):
    text = compiled(
        name, (2, 176, 4, 128), 4,
        lambda valid, mode: kernels.Middleware(96, mode) & kernels.Keys(valid),
    )  # fmt: skip
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("name", TPUS)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_compiler_takes_the_blocked_kernel_for_every_tpu(name, dim):
    """A chat decoder's attention at stage 3, grouped; none but this kernel runs at that length."""
    text = compiled(
        name, (2, 2624, 4, dim), 2, lambda valid, _: kernels.Causal() & kernels.Keys(valid)
    )
    assert text.count('custom_call_target="tpu_custom_call"') == 2
