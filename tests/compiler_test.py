"""What the TPU compiler is asked for, by chip, and what comes of it."""

import jax
import jax.numpy as jnp
import pytest

from internvl_jax import compiler, sharding
from internvl_jax.models.product import product
from internvl_jax.plan import chips, schedule, topology


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_", "sparse_cores", "fusion"),
    [("v4:2x2x1", False, None), ("v5e:2x2", False, 48), ("v5p:2x2x1", True, 32),
     ("v6e:2x2", True, 96), ("tpu7x:2x2x1", True, 64)],
)  # fmt: skip
def test_the_options_of_each_chip(slice_, sparse_cores, fusion):
    with topology.opened(slice_) as devices:
        mesh = sharding.make_mesh(fsdp=-1, devices=devices)
        with jax.set_mesh(mesh):
            options = compiler.options()
            small = compiler.options(large_fusions=False)
    assert options["xla_enable_async_all_gather"]
    assert any("sparse_core" in name for name in options) == sparse_cores
    kib = options.get("xla_tpu_scoped_vmem_limit_kib")
    assert kib == (None if fusion is None else fusion * 1024)
    assert "xla_tpu_scoped_vmem_limit_kib" not in small


@pytest.mark.slow
def test_sparse_cores_scatter_gradients_while_the_core_computes():
    """Of what eight layers on 4 replicas of 64 shards scatter, only each layer's last gradient may
    be waited for: nothing is left to compute beside it."""
    sent, waited = scattered("v6e:16x16", (4, 64, 1), layers=8, tokens=4096, width=4096)
    assert sent == pytest.approx(8 * 2 * 63 / 64 * 4096 * 8192 * 2, rel=0.02)
    assert waited <= sent / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pod", "mesh"),
    [("v6e:4x4", (4, 4, 1)), ("v6e:4x4", (2, 4, 2)), ("v5p:4x4x4", (2, 32, 1)),
     ("v5p:4x4x4", (1, 16, 4)), ("v5p:8x8x8", (4, 128, 1)), ("tpu7x:2x2x1", (2, 4, 1))],
)  # fmt: skip
def test_the_compiler_takes_meshes_of_all_kinds(pod, mesh):
    """With sums on SparseCores too it aborts, on InternViT's layers over v5p:8x8x8."""
    sent, _ = scattered(pod, mesh, layers=4, tokens=1024, width=2048)
    _, shards, parts = mesh
    whole = 4 * 2 * 2048 * 4096 * 2 / parts
    assert sent == pytest.approx((shards - 1) / shards * whole, rel=0.02)


def scattered(pod, mesh, layers, tokens, width):
    """Bytes that reduce-scatters send in the gradient of layers of two products, and those that
    the core waits for."""
    chip, shape = chips.parse(pod)

    def total(kernels, x):
        @jax.checkpoint
        def layer(x, kernels):
            hidden = jnp.tanh(product(x, kernels[0], ("embed", "mlp"), "mlp"))
            return x + product(hidden, kernels[1], ("mlp", "embed")), None

        return jnp.sum(jax.lax.scan(layer, x, kernels)[0].astype("float32"))

    with topology.opened(pod) as devices:
        mesh = sharding.make_mesh(*mesh, devices=devices)
        with jax.set_mesh(mesh):
            rows = mesh.shape["replica"] * mesh.shape["fsdp"]
            x = bfloat16((rows, tokens, width), sharding.batch_sharding(mesh).spec, mesh)
            into = bfloat16((layers, width, 2 * width), sharding.spec(None, "embed", "mlp"), mesh)
            back = bfloat16((layers, 2 * width, width), sharding.spec(None, "mlp", "embed"), mesh)
            options = compiler.options(large_fusions=False)
            step = jax.jit(jax.grad(total), compiler_options=options).trace((into, back), x)
            text = step.lower(lowering_platforms=("tpu",)).compile().as_text()
            places = [device.coords for device in mesh.devices.flat]
    return schedule.read(text, chip, places, shape).bytes_by_kind()["reduce-scatter"]


def bfloat16(shape, spec, mesh):
    return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=jax.sharding.NamedSharding(mesh, spec))


def test_a_cpu_has_no_compiler_options():
    assert compiler.options() is None
