"""Counted FLOPs against those worked out by hand."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from internvl_jax import kernels
from internvl_jax.train import flops

X, W = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((16, 32), "float32")
PRODUCT = 2 * 8 * 16 * 32


def test_products_forward_and_backward():
    assert flops.count(jnp.dot, X, W) == PRODUCT
    loss = lambda x, w: jnp.sum(jnp.tanh(x @ w))  # noqa: E731
    assert flops.count(jax.grad(loss, argnums=(0, 1)), X, W) == 3 * PRODUCT
    # What is frozen needs no gradient of its own: only the weights' product comes on top.
    assert flops.count(jax.grad(loss, argnums=1), X, W) == 2 * PRODUCT


def test_batched_contraction_and_convolution():
    q = jax.ShapeDtypeStruct((2, 5, 3, 4), "float32")
    scores = functools.partial(jnp.einsum, "bnhd,bmhd->bhnm")
    assert flops.count(scores, q, q) == 2 * (2 * 3 * 5 * 5) * 4
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    kernel = jax.ShapeDtypeStruct((2, 2, 3, 6), "float32")

    def patches(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops.count(patches, image, kernel) == 2 * (4 * 4 * 6) * (2 * 2 * 3)


def test_loops_branches_and_calls():
    square = jax.ShapeDtypeStruct((7, 16, 16), "float32")

    def scanned(x, layers):
        return jax.lax.scan(lambda c, w: (jax.jit(jnp.dot)(c, w), None), x, layers)[0]

    assert flops.count(scanned, X, square) == 7 * 2 * 8 * 16 * 16

    def branched(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w) @ w.T @ w, lambda: x @ w)

    assert flops.count(branched, X, W) == 3 * PRODUCT


def test_rematerialised_layers_count_again():
    # This is why the loop traces the model without rematerialisation.
    def loss(x, w):
        return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w.T))(x))

    plain = 2 * 3 * PRODUCT
    assert flops.count(jax.grad(loss, argnums=(0, 1)), X, W) > plain


# Over `tensor`, nothing here is cut: its two devices do the same, which is no more work done.
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_sharded_map_counts_all_devices(tensor):
    devices = jax.devices()[: 4 * tensor]
    mesh = jax.make_mesh((4, tensor), ("fsdp", "tensor"), devices=devices)
    spec = jax.sharding.PartitionSpec("fsdp")
    product = jax.shard_map(
        jnp.dot, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec
    )
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
    assert flops.count(product, x, W) == pytest.approx(PRODUCT)


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_attention_counts_as_its_formula_whatever_runs_it(monkeypatch, where):
    for name in ("attention", "attention_qkv"):
        module = importlib.import_module(f"internvl_jax.kernels.{name}")
        monkeypatch.setattr(module, "platform", lambda: where)
    batch, tokens, heads, dim = 2, 104, 2, 128
    x = jax.ShapeDtypeStruct((batch, tokens, heads, dim), "bfloat16")
    qkv = jax.ShapeDtypeStruct((batch, tokens, 3 * heads * dim), "bfloat16")

    def separate(q, k, v):
        return jnp.sum(kernels.attention(q, k, v, mask=kernels.Causal()))

    def fused(qkv):
        return jnp.sum(kernels.attention_qkv(qkv, num_heads=heads))

    products = 2 * 2 * batch * heads * tokens * tokens * dim
    for loss, arguments in ((separate, (x, x, x)), (fused, (qkv,))):
        gradient = jax.grad(loss, argnums=tuple(range(len(arguments))))
        with kernels.plain():
            assert flops.count(gradient, *arguments) == 3 * products
