"""The layers everything is made of. Parameters carry float32; products run in the input's dtype.

For inference a matrix may be an `Int8` instead, which the same layers take.

Constructors take the logical names of a weight's axes (`sharding.LOGICAL_AXES`) and create the
array already sharded. Under `jax.vmap` over keys the same constructors build stacked layers.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from internvl_jax.models.int8 import Int8
from internvl_jax.models.product import product, products
from internvl_jax.sharding import laid_positions, replicate, spec

# Of token, position, class and query embeddings. They share the residual stream with branches that
# start near unit variance; much smaller ones would be drowned by the first block (the release's
# defaults draw positions and class token from N(0, 1)).
EMBEDDING_STD = 0.5


def normal(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float):
    """A float32 parameter drawn from N(0, std²), sharded by its logical axes."""
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes)))


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...] | None = None):
    """A float32 parameter filled with one value."""
    axes = axes if axes is not None else (None,) * len(shape)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes)))


class Linear(nnx.Module):
    """y = x·kernel (+ bias) over the last axis; kernel is (in, out), initially N(0, 1/in).

    At the published widths that is close to the 0.02 of BEiT and LLaMA (0.018 at 3200), and unlike
    a constant it keeps small models from starting with branches that hardly contribute.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        key: jax.Array,
        *,
        axes: tuple[str | None, str | None] = (None, None),
        bias: bool = False,
    ):
        self.axes = axes
        self.kernel = normal(key, (inputs, outputs), axes, inputs**-0.5)
        self.bias = constant(0.0, (outputs,)) if bias else None

    def __call__(
        self,
        x: jax.Array,
        out_axis: str | None = None,
        *,
        scale: jax.Array | None = None,
        positions: str | None = None,
    ) -> jax.Array:
        """[B, …, in] → [B, …, out]; `out_axis` names how the result's last axis is sharded.

        scale: [out], multiplies the result. It is multiplied into the weights, so that the gradient
        of the scale does not need the result without it.
        positions: see `product`.
        """
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        if scale is not None:
            kernel, bias = kernel * scale, None if bias is None else bias * scale
        y = product(x, kernel, self.axes, out_axis, positions=positions)
        return y if bias is None else y + bias.astype(x.dtype)


def together(x: jax.Array, layers: Sequence[Linear], out_axis: str | None) -> list[jax.Array]:
    """[layer(x, out_axis) for each], for layers whose kernels lie alike (`products`)."""
    found = products(x, [layer.kernel[...] for layer in layers], layers[0].axes, out_axis)
    return [
        y if layer.bias is None else y + layer.bias[...].astype(x.dtype)
        for y, layer in zip(found, layers, strict=True)
    ]


class RMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + eps) · scale; statistics in float32, cast back before the scale."""

    def __init__(self, width: int, eps: float):
        self.scale = constant(1.0, (width,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Mean-and-variance normalisation with scale and bias; statistics in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = constant(1.0, (width,))
        self.bias = constant(0.0, (width,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding table [V, W], sharded on its width."""

    def __init__(self, vocab_size: int, width: int, key: jax.Array):
        self.embedding = normal(key, (vocab_size, width), (None, "embed"), EMBEDDING_STD)

    def __call__(self, tokens: jax.Array, dtype: str) -> jax.Array:
        """int32 [B, T] → [B, T, W]. The table is cast, then gathered like any FSDP weight."""
        table = self.embedding[...]
        table = table if isinstance(table, Int8) else table.astype(dtype)
        out = spec("batch", None, None)
        rows = jax.tree.map(lambda a: replicate(a).at[tokens].get(out_sharding=out), table)
        return rows.astype(dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x · ½(1 + erf(x/√2)), as PyTorch computes it; in float32, cast back.

    JAX's own uses erfc, whose derivative within a fused product takes a TPU longer and more memory.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Mlp(nnx.Module):
    """fc1 → exact GELU → fc2, both with bias."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        key: jax.Array,
        *,
        axes: tuple[str | None, str | None, str | None] = (None, None, None),
    ):
        first, second = jax.random.split(key)
        self.fc1 = Linear(inputs, hidden, first, axes=axes[:2], bias=True)
        self.fc2 = Linear(hidden, outputs, second, axes=axes[1:], bias=True)

    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """[B, …, in] → [B, …, out], times `scale` [out]."""
        return self.fc2(gelu(self.fc1(x)), scale=scale)


class SwiGlu(nnx.Module):
    """down(silu(gate(x)) ⊙ up(x)), no biases (LLaMA)."""

    def __init__(self, width: int, hidden: int, key: jax.Array):
        gate, up, down = jax.random.split(key, 3)
        self.gate = Linear(width, hidden, gate, axes=("embed", "mlp"))
        self.up = Linear(width, hidden, up, axes=("embed", "mlp"))
        self.down = Linear(hidden, width, down, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = together(x, (self.gate, self.up), "mlp")
        hidden = jax.nn.silu(gate) * up
        # Written out once: a compiler that fuses it into products computes it again in each.
        return self.down(jax.lax.optimization_barrier(hidden), positions=laid_positions(x))


def split_each(keys: jax.Array, count: int) -> jax.Array:
    """Keys [B], one per example → [count, B]."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def uniform_each(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A draw per example, [B, *shape], from keys [B].

    So an example's draw is its own: it does not depend on the rest of its batch.
    """
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def drop_path(x: jax.Array, rate: jax.Array | float, keys: jax.Array | None) -> jax.Array:
    """Stochastic depth: drop a whole residual branch per example, scale the kept ones by 1/keep.

    `x` is [B, …], `keys` [B]; None means evaluation. (timm DropPath semantics.)
    """
    if keys is None:
        return x
    keep = 1.0 - rate
    kept = uniform_each(keys, (1,) * (x.ndim - 1)) < keep
    return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros_like(x))


def stack(build: Any, depth: int, key: jax.Array) -> Any:
    """Build `depth` layers as one module whose arrays have a leading layer axis."""
    return jax.vmap(build)(jax.random.split(key, depth))


# What a layer keeps for its backward pass, from the least memory to the least recomputation. The
# names are those of `checkpoint_name` in `attention.py`, `product.py` and the kernels.
_policies = jax.checkpoint_policies
_keep = _policies.save_only_these_names
REMAT_POLICIES = {
    "full": _policies.nothing_saveable,
    "attention": _keep("attention"),
    "projections": _keep("attention", "qkv"),
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _keep("attention", "sum")
    ),
    "none": None,
}


def remat(body: Any, policy: str) -> Any:
    """Wrap a scan body in rematerialisation by the name of a policy.

    "full" keeps the layer's input alone; "attention" also what attention gives, "projections" its
    queries, keys and values too, "dots" every product with a weight besides; "none" keeps
    everything.
    """
    if policy == "none":
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[policy])
