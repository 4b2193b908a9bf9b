"""Fused attention computes what its parts do: norm, heads, attention, and all gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal, jaxprs_in_params

from internvl_jax import kernels
from internvl_jax.kernels.attention_qkv import IMPLEMENTATIONS
from internvl_jax.models.layers import RMSNorm, remat
from internvl_jax.plan import topology
from internvl_jax.sharding import make_mesh, spec

HEADS, DIM, EPS = 2, 128, 1e-6
WIDTH = HEADS * DIM


def draw(length: int, batch: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(length)
    qkv = rng.normal(size=(batch, length, 3 * WIDTH))
    query, key = 1 + 0.3 * rng.normal(size=(2, WIDTH))
    return qkv, query, key, rng.normal(size=(batch, length, WIDTH))


def exact(qkv, query_weight, key_weight, gradient, normalised):
    """Output and gradients of qkv and both weights in float64, derived by hand."""
    batch, length, _ = qkv.shape
    query, key, value = np.split(qkv, 3, axis=-1)
    weights = (query_weight, key_weight)
    inverse = [1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) for x in (query, key)]
    units = [x * i for x, i in zip((query, key), inverse, strict=True)]
    if normalised:
        query, key = (u * w for u, w in zip(units, weights, strict=True))
    q, k, v, g = (x.reshape(batch, length, HEADS, DIM) for x in (query, key, value, gradient))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(DIM)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshd->bthd", p, v)
    pull = np.einsum("bthd,bshd->bhts", g, v)
    push = p * (pull - (p * pull).sum(-1, keepdims=True)) / np.sqrt(DIM)
    gradients = [np.einsum("bhts,bshd->bthd", push, k), np.einsum("bhts,bthd->bshd", push, q)]
    gradients = [x.reshape(batch, length, WIDTH) for x in gradients]
    weight_gradients = [(x * u).sum((0, 1)) for x, u in zip(gradients, units, strict=True)]
    if normalised:
        gradients = [
            i * (x * w - u * (x * w * u).mean(-1, keepdims=True))
            for x, w, u, i in zip(gradients, weights, units, inverse, strict=True)
        ]
    gradients.append(np.einsum("bhts,bthd->bshd", p, g).reshape(batch, length, WIDTH))
    return out.reshape(batch, length, WIDTH), np.concatenate(gradients, -1), *weight_gradients


def computed(implementation, dtype, normalised, qkv, query_weight, key_weight, gradient):
    @jax.jit
    def run(qkv, query, key, gradient):
        def attend(qkv, query, key):
            norms = (query, key) if normalised else None
            return kernels.attention_qkv(
                qkv, num_heads=HEADS, qk_norm=norms, eps=EPS, implementation=implementation
            )

        out, pull = jax.vjp(attend, qkv, query, key)
        return out, *pull(gradient)

    qkv, gradient = (jnp.asarray(x, dtype) for x in (qkv, gradient))
    query_weight, key_weight = (jnp.asarray(x, jnp.float32) for x in (query_weight, key_weight))
    found = run(qkv, query_weight, key_weight, gradient)
    return [np.asarray(x.astype(jnp.float32)) for x in found]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-3)


def check(implementation, length, dtype, normalised):
    arrays = draw(length, batch=1 if length > 300 else 2)
    expected = exact(*arrays, normalised)
    bound = 2e-6 if dtype == "float32" else 0.02
    found = computed(implementation, dtype, normalised, *arrays)
    for name, got, want in zip(
        ("out", "qkv", "query weight", "key weight"), found, expected, strict=True
    ):
        if normalised or "weight" not in name:
            assert distance(got, want) < bound, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_and_gradients_in_float64(implementation):
    check(implementation, 7, "float32", True)


@pytest.mark.parametrize(("length", "dtype"), [(129, "float32"), (257, "bfloat16")])
def test_a_last_row_outside_the_tiles(length, dtype):
    check("pallas_tpu", length, dtype, True)


@pytest.mark.slow
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 99, 257, 385])
def test_lengths_of_the_model(length, dtype, normalised):
    check("pallas_tpu", length, dtype, normalised)


@pytest.fixture
def by_heads(monkeypatch):
    """XLA's path of a TPU, on this machine."""
    module = importlib.import_module("internvl_jax.kernels.attention_qkv")
    monkeypatch.setattr(module, "platform", lambda: "tpu")


@pytest.mark.usefixtures("by_heads")
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("length", "dtype"), [(1, "float32"), (99, "float32"), (129, "bfloat16")])
def test_one_head_at_a_time(length, dtype, normalised):
    check("xla", length, dtype, normalised)


@pytest.mark.usefixtures("by_heads")
def test_norm_of_a_head_rounds_as_the_layer_does():
    with jax.disable_jit():  # compiled, a CPU rounds less often in either
        check_rounding("xla")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_norm_rounds_as_the_layer_does(implementation):
    check_rounding(implementation)


def check_rounding(implementation):
    qkv, query_weight, key_weight, _ = draw(2)
    qkv = jnp.asarray(qkv, jnp.bfloat16)
    norm = RMSNorm(WIDTH, EPS)
    query, key, value = jnp.split(qkv, 3, axis=-1)
    normalised = []
    for x, weight in ((query, query_weight), (key, key_weight)):
        norm.scale[...] = jnp.asarray(weight, jnp.float32)
        normalised.append(norm(x))
    plain = jnp.concatenate([*normalised, value], axis=-1)
    unfused = kernels.attention_qkv(plain, num_heads=HEADS, implementation=implementation)
    norms = (jnp.asarray(query_weight, jnp.float32), jnp.asarray(key_weight, jnp.float32))
    fused = kernels.attention_qkv(
        qkv, num_heads=HEADS, qk_norm=norms, eps=EPS, implementation=implementation
    )
    np.testing.assert_array_equal(fused.astype(jnp.float32), unfused.astype(jnp.float32))


def test_devices_of_a_mesh_share_the_batch():
    check_mesh("pallas_tpu")


@pytest.mark.usefixtures("by_heads")
def test_devices_of_a_mesh_share_the_batch_of_each_head():
    check_mesh("xla")


def check_mesh(implementation):
    qkv, query, key, gradient = draw(7, batch=8)
    alone = computed(implementation, "float32", True, qkv, query, key, gradient)
    with jax.set_mesh(make_mesh(replica=2, fsdp=2, tensor=2)):
        rows = spec("batch", None, None)
        qkv, gradient = (jax.device_put(jnp.asarray(x, jnp.float32), rows)
                         for x in (qkv, gradient))  # fmt: skip
        found = computed(implementation, "float32", True, qkv, query, key, gradient)
    for got, expected in zip(found, alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def fused(x):
    return kernels.attention_qkv(x, num_heads=HEADS, implementation="pallas_tpu")


def separate(x):
    parts = (part.reshape(*x.shape[:2], HEADS, DIM) for part in jnp.split(x, 3, axis=-1))
    return kernels.attention(*parts, implementation="pallas_tpu")


def blocked(x):
    """Of heads too narrow for the short kernel."""
    parts = (part.reshape(*x.shape[:2], 2 * HEADS, DIM // 2) for part in jnp.split(x, 3, axis=-1))
    return kernels.attention(*parts, implementation="pallas_tpu")


@pytest.mark.parametrize("attend", [fused, separate, blocked])
@pytest.mark.parametrize(
    ("policy", "calls"), [("full", 3), ("attention", 2), ("dots", 2), ("none", 2)]
)
def test_a_policy_that_keeps_attention_does_not_run_it_again(policy, calls, attend):
    body = remat(lambda x: jnp.sum(jnp.sin(attend(jnp.sin(x)))), policy)
    jaxpr = jax.make_jaxpr(jax.grad(body))(jnp.ones((1, 8, 3 * WIDTH)))
    assert needed(jaxpr.jaxpr, "pallas_call") == calls


@pytest.mark.usefixtures("by_heads")
@pytest.mark.parametrize(
    ("policy", "loops"), [("full", 3), ("attention", 2), ("dots", 2), ("none", 2)]
)
def test_a_policy_that_keeps_attention_does_not_go_through_the_heads_again(policy, loops):
    def attend(x):
        return kernels.attention_qkv(x, num_heads=HEADS, implementation="xla")

    body = remat(lambda x: jnp.sum(jnp.sin(attend(jnp.sin(x)))), policy)
    jaxpr = jax.make_jaxpr(jax.grad(body))(jnp.ones((1, 8, 3 * WIDTH)))
    assert needed(jaxpr.jaxpr, "scan") == loops


def needed(jaxpr, primitive: str) -> int:
    """Calls of a primitive of which some result is used."""
    used = {v for e in jaxpr.eqns for v in e.invars if not isinstance(v, Literal)}
    used |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            count += any(v in used for v in equation.outvars)
        else:
            count += sum(needed(inner, primitive) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_takes_it_for_every_tpu(name):
    with topology.opened(name) as devices, jax.set_mesh(make_mesh(devices=devices[:1])):
        place = jax.sharding.NamedSharding(
            make_mesh(devices=devices[:1]), jax.sharding.PartitionSpec()
        )

        def loss(x):
            return jnp.sum(kernels.attention_qkv(x, num_heads=HEADS).astype(jnp.float32))

        x = jax.ShapeDtypeStruct((2, 257, 3 * WIDTH), jnp.bfloat16, sharding=place)
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.slow
def test_the_compiler_keeps_the_scores_of_one_head():
    with topology.opened("v5e:2x2") as devices, jax.set_mesh(make_mesh(fsdp=4, devices=devices)):

        def loss(x):
            mixed = kernels.attention_qkv(x, num_heads=HEADS, implementation="xla")
            return jnp.sum(mixed.astype(jnp.float32))

        place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec("batch", None, None))
        x = jax.ShapeDtypeStruct((8, 257, 3 * WIDTH), jnp.bfloat16, sharding=place)
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "f32[2,257,257]" in text
    assert "[2,2,257,257]" not in text


@pytest.mark.parametrize(
    ("shape", "heads", "mask", "message"),
    [
        ((1, 4, 3 * 64), 1, None, "a head has 64 columns, the kernel takes 128"),
        ((1, 2000, 3 * 128), 1, None, "2000 tokens; the kernel takes at most"),
        ((1, 4, 3 * 128), 1, kernels.Causal(), "no mask Causal"),
    ],
)
def test_the_kernel_says_why_it_cannot(shape, heads, mask, message):
    with pytest.raises(ValueError, match=f"'pallas_tpu' cannot run: .*{message}"):
        kernels.attention_qkv(
            jnp.ones(shape), num_heads=heads, mask=mask, implementation="pallas_tpu"
        )
    kernels.attention_qkv(jnp.ones(shape), num_heads=heads, mask=mask)


def test_errors_name_the_choice():
    with pytest.raises(ValueError, match="choose from"):
        kernels.attention_qkv(jnp.ones((1, 2, 6)), num_heads=1, implementation="flash")
    with pytest.raises(ValueError, match="8 columns are not"):
        kernels.attention_qkv(jnp.ones((1, 2, 8)), num_heads=2)
