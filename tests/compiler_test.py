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
     ("v6e:2x2", True, 96), ("tpu7x:2x2x1", True, 48)],
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
    """Eight layers of two products on 4 replicas of 64 shards. Of what they scatter, only a layer's
    last gradient may be waited for: nothing is left to compute beside it."""
    pod = "v6e:16x16"
    chip, shape = chips.parse(pod)

    def total(kernels, x):
        @jax.checkpoint
        def layer(x, kernels):
            hidden = jnp.tanh(product(x, kernels[0], ("embed", None)))
            return x + product(hidden, kernels[1], (None, "embed")), None

        return jnp.sum(jax.lax.scan(layer, x, kernels)[0].astype("float32"))

    with topology.opened(pod) as devices:
        mesh = sharding.make_mesh(4, 64, 1, devices=devices)
        with jax.set_mesh(mesh):
            x = bfloat16((256, 4096, 4096), sharding.batch_sharding(mesh).spec, mesh)
            into = bfloat16((8, 4096, 8192), sharding.spec(None, "embed", None), mesh)
            back = bfloat16((8, 8192, 4096), sharding.spec(None, None, "embed"), mesh)
            options = compiler.options(large_fusions=False)
            text = gradient_of(total, options, (into, back), x).as_text()
            places = [device.coords for device in mesh.devices.flat]
    sent, waited = schedule.read(text, chip, places, shape).bytes_by_kind()["reduce-scatter"]
    assert sent == pytest.approx(8 * 2 * 63 / 64 * 4096 * 8192 * 2, rel=0.02)
    assert waited <= sent / 2


def bfloat16(shape, spec, mesh):
    return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=jax.sharding.NamedSharding(mesh, spec))


def gradient_of(function, options, *arguments):
    step = jax.jit(jax.grad(function), compiler_options=options).trace(*arguments)
    return step.lower(lowering_platforms=("tpu",)).compile()


def test_a_cpu_has_no_compiler_options():
    assert compiler.options() is None
