"""Small heads that are trained on frozen features: batch norm, linear, attention pooling.

Functions on dicts of arrays; the statistics of a batch norm are its state, passed along.
"""

import jax
import jax.numpy as jnp

_MOMENTUM = 0.1  # of the running statistics, as in PyTorch
Weights = dict[str, jax.Array]


def init_batch_norm(width: int) -> tuple[Weights, Weights]:
    """Weights and running statistics."""
    weights = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return weights, {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def batch_norm(
    weights: Weights, state: Weights, x: jax.Array, train: bool | jax.Array, eps: float = 1e-6
) -> tuple[jax.Array, Weights]:
    """Normalise the last axis of [..., D] over all others; returns the result and new statistics.

    In training by the batch, whose statistics flow into the running ones (the variance without
    bias); else by the running ones.
    """
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    mean, var = x.mean(axis=axes), x.var(axis=axes)
    new = {
        "mean": (1 - _MOMENTUM) * state["mean"] + _MOMENTUM * mean,
        "var": (1 - _MOMENTUM) * state["var"] + _MOMENTUM * var * count / max(count - 1, 1),
    }
    mean = jnp.where(train, mean, state["mean"])
    var = jnp.where(train, var, state["var"])
    y = (x - mean) * jax.lax.rsqrt(var + eps) * weights["scale"] + weights["bias"]
    return y, jax.tree.map(lambda a, b: jnp.where(train, a, b), new, state)


def init_linear(key: jax.Array, inputs: int, outputs: int) -> Weights:
    """Weights N(0, 0.01), bias 0, as the released probe."""
    kernel = 0.01 * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def init_attention_pool(key: jax.Array, width: int) -> dict[str, Weights]:
    """A pooling block from `width` to `width`; see `models.attention.AttentionPool`."""
    keys = jax.random.split(key, 4)
    names = ("q", "k", "v", "proj")
    weights = {
        name: {
            "kernel": width**-0.5 * jax.random.normal(k, (width, width)),
            "bias": jnp.zeros(width),
        }
        for name, k in zip(names, keys, strict=True)
    }
    norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    return weights | {f"norm_{name}": dict(norm) for name in "qkv"}


def attention_pool(weights: dict[str, Weights], x: jax.Array, heads: int) -> jax.Array:
    """The mean token asks all tokens once, [B, N, D] → [B, D]."""

    def project(name, x):
        return x @ weights[name]["kernel"] + weights[name]["bias"]

    def split(x):
        return x.reshape(*x.shape[:-1], heads, -1)

    def norm(name, x):
        return layer_norm(weights[f"norm_{name}"], x)

    seed = x.mean(axis=1, keepdims=True)
    query, key = split(project("q", norm("q", seed))), split(project("k", norm("k", x)))
    value = split(project("v", norm("v", x)))
    weight = jnp.einsum("bqhd,bnhd->bhqn", query, key) * query.shape[-1] ** -0.5
    mixed = jnp.einsum("bhqn,bnhd->bqhd", jax.nn.softmax(weight, axis=-1), value)
    return project("proj", mixed.reshape(x.shape[0], -1))


def layer_norm(weights: Weights, x: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Normalise each row of the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + eps)
    return scaled * weights["scale"] + weights["bias"]
