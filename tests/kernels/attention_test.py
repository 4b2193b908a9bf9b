"""Every implementation of attention computes what the definition says, for every mask."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from internvl_jax import kernels, sharding
from internvl_jax.kernels import blocked_tpu, reference, short_tpu
from internvl_jax.kernels.attention import IMPLEMENTATIONS
from internvl_jax.plan import topology

QUERIES = 4
MODES = np.array([kernels.ITM, kernels.ITC, kernels.ITG], np.int32)
KERNELS = {"short": short_tpu, "blocked": blocked_tpu}  # the two of "pallas_tpu"
# cuDNN needs an NVIDIA GPU: this machine runs what its guards accept.
NAMES = [*KERNELS, *(name for name in IMPLEMENTATIONS if name not in ("pallas_tpu", "cudnn"))]


def valid(length: int) -> np.ndarray:
    rows = np.ones((3, length), bool)
    rows[1, length * 2 // 3 :] = False
    rows[2, length // 2] = False
    return rows


def counts(length: int) -> np.ndarray:
    return np.array([length, 0, (length + 1) // 2], np.int32)


def segments(length: int) -> np.ndarray:
    return np.sort(np.random.default_rng(7).integers(0, 3, (3, length)), axis=1).astype(np.int32)


def allowed(name: str, queries: int, keys: int) -> np.ndarray:
    """bool [3, T, S]: what each mask lets queries see, from the table in spec form."""
    t, s = np.arange(queries)[:, None], np.arange(keys)[None]
    both_queries = (t < QUERIES) & (s < QUERIES)
    both_text = (t >= QUERIES) & (s >= QUERIES)
    one = {
        "full": np.ones((queries, keys), bool),
        "causal": s <= t,
        "prefix": both_queries | (s <= t),
        "separate": both_queries | (both_text & (s <= t)),
    }
    if name in one:
        return np.broadcast_to(one[name], (3, queries, keys))
    if name == "keys":
        return np.broadcast_to(valid(keys)[:, None], (3, queries, keys))
    if name == "lengths":
        return np.broadcast_to(s < counts(keys)[:, None, None], (3, queries, keys))
    if name == "segments":
        return segments(queries)[:, :, None] == segments(keys)[:, None]
    if name == "middleware":
        return np.stack([one["full"], one["separate"], one["prefix"]])
    first, second = name.split(" & ")
    return allowed(first, queries, keys) & allowed(second, queries, keys)


def mask_of(name: str, queries: int, keys: int) -> kernels.Mask:
    if " & " in name:
        first, second = name.split(" & ")
        return mask_of(first, queries, keys) & mask_of(second, queries, keys)
    return {
        "full": kernels.Full(),
        "causal": kernels.Causal(),
        "prefix": kernels.Prefix(QUERIES),
        "separate": kernels.Separate(QUERIES),
        "keys": kernels.Keys(jnp.asarray(valid(keys))),
        "lengths": kernels.Lengths(jnp.asarray(counts(keys))),
        "segments": kernels.Segments(jnp.asarray(segments(queries)), jnp.asarray(segments(keys))),
        "middleware": kernels.Middleware(QUERIES, jnp.asarray(MODES)),
    }[name]


MASKS = ["full", "causal", "prefix", "separate", "keys", "lengths", "segments", "middleware",
         "causal & keys", "causal & segments"]  # fmt: skip


def inputs(queries, keys, heads=4, key_heads=2, dim=64, dtype=jnp.float32, batch=3):
    rng = np.random.default_rng(queries)
    shapes = ((queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads))
    return [jnp.asarray(rng.normal(size=(batch, *s, dim)), dtype) for s in shapes]


def by_hand(query, key, value, gradient, visible) -> list[np.ndarray]:
    """Softmax attention in float64 and its gradients, one row and head at a time."""
    query, key, value, gradient = (np.asarray(a, np.float64) for a in (query, key, value, gradient))
    scale, group = query.shape[-1] ** -0.5, query.shape[2] // key.shape[2]
    out, dq, dk, dv = (np.zeros_like(a) for a in (query, query, key, value))
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[2])):
        q, g = query[b, :, h], gradient[b, :, h]
        k, v = key[b, :, h // group], value[b, :, h // group]
        scores = np.where(visible[b], q @ k.T * scale, -np.inf)
        most = scores.max(-1, keepdims=True)
        weights = np.exp(scores - np.where(np.isfinite(most), most, 0))
        total = weights.sum(-1, keepdims=True)
        weights = weights / np.where(total > 0, total, 1)
        out[b, :, h] = weights @ v
        to_weights = g @ v.T
        to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * scale
        dq[b, :, h] = to_scores @ k
        dk[b, :, h // group] += to_scores.T @ q
        dv[b, :, h // group] += weights.T @ g
    return [out, dq, dk, dv]


def computed(attend, query, key, value, gradient) -> list[np.ndarray]:
    @jax.jit
    def run(query, key, value, gradient):
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(gradient)

    return [np.asarray(a, np.float64) for a in run(query, key, value, gradient)]


def check(got, expected, dtype) -> None:
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, expected, strict=True):
        tolerance = (2e-5 if dtype == jnp.float32 else 2e-2) * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=name)


def attention_by(name: str, mask: kernels.Mask):
    """Attention by one kernel of "pallas_tpu", interpreted, or by another implementation."""
    if name in KERNELS:
        return functools.partial(KERNELS[name].attention, mask=mask, interpret=True)
    return functools.partial(kernels.attention, mask=mask, implementation=name)


def suite(implementation, mask, queries, keys, dtype=jnp.float32, dim=64, **sizes) -> None:
    dim = 128 if implementation == "short" else dim
    arrays = inputs(queries, keys, dtype=dtype, dim=dim, **sizes)
    attend = attention_by(implementation, mask_of(mask, queries, keys))
    expected = by_hand(*arrays, allowed(mask, queries, keys))
    check(computed(attend, *arrays), expected, dtype)


def cut(monkeypatch) -> None:
    """Several blocks or tiles of 128 for 150 positions, the last hanging over."""
    monkeypatch.setattr(blocked_tpu, "BLOCK", 128)
    monkeypatch.setattr(short_tpu, "UNTILED", 64)
    monkeypatch.setattr(short_tpu, "TILES", (128,))


QUICK = ("middleware", "causal & keys", "causal & segments")  # these hold the other masks' parts


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries,keys", [(1, 1), (7, 7), (99, 129), (257, 257)])
@pytest.mark.parametrize("implementation", NAMES)
def test_lengths_types_and_masks(implementation, queries, keys, mask, dtype):
    suite(implementation, mask, queries, keys, dtype, dim=128, heads=2, key_heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["full", "causal", "causal & keys", "causal & segments"])
@pytest.mark.parametrize(
    "implementation,dim", [("short", 128), *itertools.product(NAMES[1:], (64, 128))]
)
def test_many_blocks(implementation, dim, mask):
    suite(implementation, mask, 1025, 1025, dim=dim, heads=2, key_heads=1)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("implementation", NAMES)
def test_a_row_that_sees_nothing_gives_zeros_and_no_gradient(implementation):
    attend = attention_by(implementation, kernels.Keys(jnp.zeros((3, 5), bool)))
    for result in computed(attend, *inputs(5, 5, dim=128)):
        assert not result.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_takes_the_short_kernel_for_every_tpu(name):
    with topology.opened(name) as devices:
        mesh = sharding.make_mesh(devices=devices[:1])
        place = jax.sharding.NamedSharding(mesh, P())
        shapes = ((2, 176, 4, 128), jnp.bfloat16), ((2, 176), jnp.int32), ((2,), jnp.int32)
        avals = [jax.ShapeDtypeStruct(*s, sharding=place) for s in shapes]

        def loss(x, valid, mode):
            mask = kernels.Middleware(96, mode) & kernels.Keys(valid)
            return jnp.sum(kernels.attention(x, x, x, mask=mask).astype(jnp.float32))

        with jax.set_mesh(mesh):
            traced = jax.jit(jax.value_and_grad(loss)).trace(*avals)
            text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


def test_probabilities_sum_to_one_over_what_is_visible():
    query, key, *_ = inputs(11, 11)
    weights = reference.probabilities(query, key, mask=mask_of("causal & keys", 11, 11))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    assert not np.any(np.asarray(weights)[1, :, :, 8:])


@pytest.mark.parametrize("mask", MASKS)
def test_spans_never_claim_what_a_pair_denies(mask):
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
        some, every = made.replace(arrays).span(*spans)
        tile = visible[b, i : i + size, j : j + size]
        assert bool(some) >= tile.any()
        assert bool(every) <= tile.all()


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
