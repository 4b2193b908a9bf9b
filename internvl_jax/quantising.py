"""Parameters read from any kind of checkpoint straight into int8, a matrix at a time."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from internvl_jax.models import lora
from internvl_jax.models.int8 import Int8, channel_axis, described, quantise
from internvl_jax.rules import unflatten

_BLOCK = 1 << 22  # weights that are in float32 at once


class Parameter(Protocol):
    """One array that is somewhere; `read` gives it, or the part of an index of slices."""

    shape: tuple[int, ...]

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray: ...


def read(
    parameters: Mapping[str, Parameter], shapes: Mapping[str, Any], dtype: Any = None
) -> dict[str, Any]:
    """Nested dict of parameters on the devices, matrices as `Int8`.

    Host memory holds one matrix as it is stored (of a checkpoint of ours, the block that it lies
    in) and one stack of them in int8. Adapters are folded into their kernels first. Every process
    reads whole matrices, since a scale is that of a whole channel, and keeps its devices' parts.

    parameters: {path: parameter}, with adapters or without. shapes: {path: shape} without adapters,
    under a mesh with shardings. dtype: of what stays in floating point; None keeps what is stored.
    """
    places = described({path: shapes[path] for path in parameters if path in shapes})
    params = {}
    for path, place in places.items():
        if isinstance(place, Int8):
            values, scale = _quantised(path, parameters)
            params[path] = Int8(_put(values, place.values), _put(scale, place.scale))
        else:
            array = parameters[path].read()
            floating = dtype is not None and jnp.issubdtype(array.dtype, jnp.floating)
            params[path] = _put(array.astype(dtype) if floating else array, place)
    return unflatten(params)


def _quantised(
    path: str, parameters: Mapping[str, Parameter]
) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of a parameter, its stacked matrices one after another."""
    *stacked, rows, columns = parameters[path].shape
    axis = channel_axis(path)
    values = np.empty((*stacked, rows, columns), np.int8)
    scale = np.empty((*stacked, *((1, columns) if axis == -2 else (rows, 1))), np.float32)
    stem = path.removesuffix("/kernel")
    names = [f"{stem}/{name}" for name in ("lora_a", "lora_b")]
    adapter = None
    if names[0] in parameters:
        adapter = [parameters[name].read().astype(np.float32) for name in names]
    for layer in range(stacked[0]) if stacked else (None,):
        if layer is None:
            matrix = parameters[path].read()
        else:
            one = (slice(layer, layer + 1), slice(None), slice(None))
            matrix = parameters[path].read(one)[0]
        if adapter is not None:
            a, b = adapter if layer is None else (part[layer] for part in adapter)
            matrix = matrix.astype(np.float32) + lora.SCALE * (a @ b)
        into, scales = (a if layer is None else a[layer] for a in (values, scale))
        channels = matrix.shape[1] if axis == -2 else matrix.shape[0]
        step = max(_BLOCK * channels // matrix.size, 1)
        for start in range(0, channels, step):
            part = slice(start, start + step)
            part = (slice(None), part) if axis == -2 else (part,)
            into[part], scales[part] = quantise(matrix[part], axis)
    return values, scale


def _put(array: np.ndarray, place: jax.ShapeDtypeStruct) -> jax.Array:
    if place.sharding is None:
        return jax.device_put(array)
    sharding = NamedSharding(jax.sharding.get_mesh(), place.sharding.spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
