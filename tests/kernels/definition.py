"""What attention is, by hand in float64, and the inputs that implementations are compared on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import kernels
from internvl_jax.kernels import blocked_tpu, short_kernels_tpu, short_tpu
from internvl_jax.kernels.attention import IMPLEMENTATIONS

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
QUICK = ("middleware", "causal & keys", "causal & segments")  # these hold the other masks' parts


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
    monkeypatch.setattr(short_kernels_tpu, "UNTILED", 64)
    monkeypatch.setattr(short_kernels_tpu, "TILES", (128,))
