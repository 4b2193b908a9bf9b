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
from internvl_jax.kernels import blocked_tpu, reference
from internvl_jax.kernels.attention import IMPLEMENTATIONS

QUERIES = 4
MODES = np.array([kernels.ITM, kernels.ITC, kernels.ITG], np.int32)
# cuDNN needs an NVIDIA GPU: this machine runs what its guards accept.
NAMES = [name for name in IMPLEMENTATIONS if name != "cudnn"]


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


def suite(implementation, mask, queries, keys, dtype=jnp.float32, **sizes) -> None:
    arrays = inputs(queries, keys, dtype=dtype, **sizes)
    attend = functools.partial(
        kernels.attention, mask=mask_of(mask, queries, keys), implementation=implementation
    )
    expected = by_hand(*arrays, allowed(mask, queries, keys))
    check(computed(attend, *arrays), expected, dtype)


QUICK = ("middleware", "causal & keys", "causal & segments")  # these hold the other masks' parts


@pytest.mark.parametrize(
    "implementation,mask",
    [
        pytest.param(name, mask, marks=[pytest.mark.slow] * (name == "pallas_tpu"))
        if mask not in QUICK
        else (name, mask)
        for name, mask in itertools.product(NAMES, MASKS)
    ],
)
def test_attention_and_its_gradients_follow_the_definition(implementation, mask, monkeypatch):
    monkeypatch.setattr(blocked_tpu, "BLOCK", 128)  # several blocks, the last hanging over
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
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("implementation", NAMES)
def test_many_blocks(implementation, dim, mask):
    suite(implementation, mask, 1025, 1025, dim=dim, heads=2, key_heads=1)


@pytest.mark.parametrize("implementation", NAMES)
def test_one_key_head_and_bfloat16(implementation):
    suite(implementation, "causal", 7, 7, jnp.bfloat16, heads=3, key_heads=1)


@pytest.mark.parametrize("implementation", NAMES)
def test_under_a_mesh_each_device_does_its_part(implementation):
    arrays = inputs(9, 9, batch=4)
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
def test_the_simulated_tpu_finds_no_race_no_stray_read_and_no_use_of_unwritten_memory(
    mask, monkeypatch
):
    """Unwritten memory, output buffers included, holds NaN."""
    monkeypatch.setattr(blocked_tpu, "BLOCK", 128)
    arrays = inputs(150, 150, heads=2, key_heads=1, dim=128)
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    attend = functools.partial(
        blocked_tpu.attention, mask=mask_of(mask, 150, 150), interpret=simulated
    )
    check(computed(attend, *arrays), by_hand(*arrays, allowed(mask, 150, 150)), jnp.float32)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("implementation", NAMES)
def test_a_row_that_sees_nothing_gives_zeros_and_no_gradient(implementation):
    mask = kernels.Keys(jnp.zeros((3, 5), bool))
    attend = functools.partial(kernels.attention, mask=mask, implementation=implementation)
    for result in computed(attend, *inputs(5, 5)):
        assert not result.any()


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
