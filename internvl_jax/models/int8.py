"""Weights in eight bits for inference: whole numbers and one float32 scale per output channel.

A weight w of a channel becomes round(w / s) with s = largest |w| of the channel / 127, so that no
weight moves by more than s / 2. Only the matrices of linear layers and the embedding tables are
held so; biases, norms, layer scales, queries and positions stay as they are. Activations keep their
dtype: the numbers go into a product as they are, exact in bfloat16 too, and the scale multiplies
its result.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.rules import flatten

LARGEST = 127
KINDS = ("int8",)  # of weights that `loading.load` can make


class Int8Error(ValueError):
    """Weights in eight bits where only floating-point ones will do."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix, or a stack of them; stands in a parameter tree where the float array stood.

    values: int8 [..., in, out], or [vocabulary, width] of a table. scale: float32 of the same rank,
    with length one on the axis that a channel's values lie along.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> "Int8":
        return Int8(self.values.T, self.scale.T)

    def __getitem__(self, index: Any) -> "Int8":
        return Int8(self.values[index], self.scale[index])

    def __mul__(self, channels: jax.Array) -> "Int8":
        """Times a factor per output channel, [out]."""
        return Int8(self.values, self.scale * channels.astype(jnp.float32))

    def astype(self, dtype: Any) -> jax.Array:
        """The matrix in floating point."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def channel_axis(path: str) -> int | None:
    """The axis that a channel's weights lie along; None where the parameter is not held in int8."""
    layer, _, name = path.rpartition("/")
    return {"kernel": -2, "embedding": -1}.get(name) if layer else None


def quantise(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(int8 values, float32 scale) of a float array on the host; a channel of zeros has scale 1."""
    array = np.asarray(array, np.float32)
    largest = np.max(np.abs(array), axis=axis, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1))
    return np.rint(array / scale).astype(np.int8), scale


def described(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """{path: shape} of float parameters → of the same parameters in int8, shardings kept."""
    return {path: _described(path, leaf) for path, leaf in shapes.items()}


def _described(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    axis = channel_axis(path)
    if axis is None:
        return leaf
    shape, sharding = list(leaf.shape), leaf.sharding
    shape[axis] = 1
    if sharding is not None:
        axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        axes[axis] = None
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(*axes))
    return Int8(
        leaf.update(dtype=jnp.int8), jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    )


def refuse(params: Mapping[str, Any], what: str) -> None:
    """Raises Int8Error if any parameter is held in int8; `what` cannot be done with those."""
    held = [path for path, leaf in flatten(params).items() if isinstance(leaf, Int8)]
    if held:
        raise Int8Error(
            f"{what} needs floating-point weights, but {len(held)} are int8 ({held[0]}, …): they "
            "serve inference only; load the checkpoint without weights='int8'"
        )
