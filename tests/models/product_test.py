"""Products with spread weights, on eight devices, against the same product on one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import sharding
from internvl_jax.models.product import gather, product, scatter
from internvl_jax.plan import chips, schedule, topology

RNG = np.random.default_rng(0)


# Rows per device: 8 (a whole tile), 6 (even), 3 (odd).
@pytest.mark.parametrize("size", [32, 24, 12])
@pytest.mark.parametrize(
    ("mesh", "axes", "out"),
    [
        ((2, 4, 1), (None, "vit_wide"), None),
        ((2, 4, 1), ("vit_wide", None), None),
        ((1, 4, 2), ("embed", "mlp"), "mlp"),
        ((1, 4, 2), ("mlp", "embed"), None),
        ((8, 1, 1), ("embed", "mlp"), "mlp"),
        ((2, 4, 1), (None, None), None),
        ((1, 1, 1), ("embed", "mlp"), "mlp"),
    ],
)
def test_a_product_and_its_gradients(mesh, axes, out, size):
    shape = (size, 20) if axes[0] in ("vit_wide", "embed") else (20, size)
    kernel = RNG.normal(size=shape).astype(np.float32)
    x = RNG.normal(size=(16, 3, shape[0])).astype(np.float32)
    weights = RNG.normal(size=(16, 3, shape[1])).astype(np.float32)

    def total(y):
        return jnp.sum(weights * jnp.sin(y))

    expected = jax.value_and_grad(lambda x, kernel: total(x @ kernel), (0, 1))(x, kernel)
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])
    with jax.set_mesh(mesh):
        inner = axes[0] if axes[0] == "mlp" else None
        places = sharding.spec("batch", None, inner), sharding.spec(*axes)
        placed = [
            jax.device_put(a, jax.sharding.NamedSharding(mesh, p))
            for a, p in zip((x, kernel), places, strict=True)
        ]
        spread_out = lambda x, k: total(product(x, k, axes, out))  # noqa: E731
        got = jax.jit(jax.value_and_grad(spread_out, (0, 1)))(*placed)
        assert got[1][1].sharding.spec == places[1]
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_gradient_is_scattered_and_only_its_parts_are_added_over_replicas():
    mesh = sharding.make_mesh(2, 4, 1)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 3, 64), "float32", sharding=sharding.batch_sharding(mesh))
        place = jax.sharding.NamedSharding(mesh, sharding.spec(None, "vit_wide"))
        kernel = jax.ShapeDtypeStruct((64, 96), "float32", sharding=place)
        gradient = jax.grad(lambda k, x: jnp.sum(product(x, k, (None, "vit_wide")) ** 2))
        text = jax.jit(gradient).lower(kernel, x).compile().as_text()
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (all-reduce|reduce-scatter)\(", text)
    sizes = {kind: np.prod([int(n) for n in shape.split(",")]) for shape, kind in moved}
    assert sizes == {"reduce-scatter": 64 * 96 / 4, "all-reduce": 64 * 96 / 4}


@pytest.mark.parametrize("groups", [(8,), (2, 4), (4, 2)])
def test_a_sum_is_scattered_alike_in_one_step_and_in_two(groups):
    mesh = sharding.make_mesh(1, 8, 1)
    parts = RNG.normal(size=(8, 8, 3, 5)).astype(np.float32)  # device, part, …
    rows = jax.sharding.PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(parts, jax.sharding.NamedSharding(mesh, rows))
        local = jax.shard_map(lambda x: scatter(x[0], groups), in_specs=rows, out_specs=rows)
        got = jax.jit(local)(placed)
    np.testing.assert_allclose(got, parts.sum(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [(8,), (2, 4), (4, 2)])
def test_rows_are_gathered_alike_in_one_step_and_in_two(groups):
    mesh = sharding.make_mesh(1, 8, 1)
    parts = RNG.normal(size=(16, 3, 5)).astype(np.float32)
    rows = jax.sharding.PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(parts, jax.sharding.NamedSharding(mesh, rows))
        local = jax.shard_map(lambda x: gather(x, groups)[None], in_specs=rows, out_specs=rows)
        got = jax.jit(local)(placed)
    np.testing.assert_array_equal(got, np.broadcast_to(parts, (8, *parts.shape)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pod", "replicas", "shards"),
    [("v5e:16x16", 1, 256), ("v5e:16x16", 4, 64), ("v5p:4x4x4", 1, 64)],
)
def test_the_tpu_compiler_gathers_and_scatters(pod, replicas, shards):
    with topology.opened(pod) as devices:
        mesh = sharding.make_mesh(replicas, shards, 1, devices=devices)
        with jax.set_mesh(mesh):
            place = sharding.batch_sharding(mesh)
            x = jax.ShapeDtypeStruct((mesh.size, 8, 4096), "bfloat16", sharding=place)
            place = jax.sharding.NamedSharding(mesh, sharding.spec("embed", "mlp"))
            kernel = jax.ShapeDtypeStruct((4096, 8192), "float32", sharding=place)
            gradient = jax.grad(lambda k, x: jnp.sum(product(x, k, ("embed", "mlp"), "mlp") ** 2))
            traced = jax.jit(gradient).trace(kernel, x)
            text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    chip, shape = chips.parse(pod)
    places = [device.coords for device in mesh.devices.flat]
    moved = schedule.read(text, chip, places, shape).bytes_by_kind()
    sent = (shards - 1) / shards * 4096 * 8192 * 2
    # The replicas add what is scattered already.
    added, _ = moved.pop("all-reduce", (0.0, 0.0))
    assert added <= 2 * (replicas > 1) * 4096 * 8192 * 2 / shards
    assert set(moved) == {"all-gather", "reduce-scatter"}
    for kind, (whole, _) in moved.items():
        assert whole == pytest.approx(sent, rel=0.1), kind
