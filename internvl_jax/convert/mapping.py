"""Tables that say which torch tensor is which of our parameters, used in both directions.

A layout is a tuple of `Rule`s. A rule names one torch key, our path, and the operation that turns
one array into the other; where one side joins what the other keeps apart (query, key and value), it
names several keys or several paths. With `layers`, the key contains `{i}` and our parameter has a
leading axis that stacks those layers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert.safetensors_files import Spec

Shape = tuple[int, ...]
_BLOCK = 64  # columns copied at a time out of a transposed array


class MappingError(ValueError):
    """Keys or shapes of a checkpoint that do not fit the model; the message lists all of them."""


class Operation(Protocol):
    """How torch tensors become arrays of ours (of one layer, where layers are stacked).

    Each method takes one argument per array of its side, and gives one array, or a tuple where the
    rule names several on the other side.
    """

    def torch_shape(self, *ours: Shape) -> Any: ...
    def to_jax(self, *arrays: np.ndarray) -> Any: ...
    def to_torch(self, *arrays: np.ndarray) -> Any: ...


@dataclass(frozen=True)
class Same:
    """The same array on both sides."""

    def torch_shape(self, ours: Shape) -> Shape:
        return ours

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclass(frozen=True)
class Transpose:
    """A linear kernel: torch stores (out, in), we store (in, out)."""

    def torch_shape(self, ours: Shape) -> Shape:
        return ours[::-1]

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return array.T

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.T


@dataclass(frozen=True)
class LeadingOnes:
    """torch has `count` leading axes of length one that we leave away."""

    count: int

    def torch_shape(self, ours: Shape) -> Shape:
        return (1,) * self.count + ours

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(array.shape[self.count :])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.reshape((1,) * self.count + array.shape)


@dataclass(frozen=True)
class PatchKernel:
    """torch convolves (D, 3, p, p); we multiply patches flattened as (row, column, channel)."""

    def torch_shape(self, ours: Shape) -> Shape:
        side = math.isqrt(ours[0] // 3)
        return (ours[1], 3, side, side)

    def to_jax(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        width, channels, side, _ = self.torch_shape(array.shape)
        return array.reshape(side, side, channels, width).transpose(3, 2, 0, 1)


@dataclass(frozen=True)
class JoinedRows:
    """Several torch tensors whose rows follow one another in one of ours, as query, key, value.

    op: what turns the joined torch tensor into our array.
    """

    op: Same | Transpose
    count: int = 3

    def torch_shape(self, ours: Shape) -> tuple[Shape, ...]:
        rows, *rest = self.op.torch_shape(ours)
        return ((rows // self.count, *rest),) * self.count

    def to_jax(self, *arrays: np.ndarray) -> np.ndarray:
        return self.op.to_jax(np.concatenate(arrays))

    def to_torch(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.split(self.op.to_torch(array), self.count))


@dataclass(frozen=True)
class GroupedQueries:
    """InternLM2's `wqkv` (rows, in): per key/value head its query heads, then key, then value.

    Ours are three kernels (in, heads · head_dim), (in, kv_heads · head_dim) twice.
    """

    kv_heads: int
    head_dim: int

    def torch_shape(self, query: Shape, key: Shape, value: Shape) -> Shape:
        return (query[1] + key[1] + value[1], query[0])

    def to_jax(self, array: np.ndarray) -> tuple[np.ndarray, ...]:
        width = array.shape[1]
        groups = array.reshape(self.kv_heads, -1, self.head_dim, width)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return tuple(part.reshape(-1, width).T for part in parts)

    def to_torch(self, *arrays: np.ndarray) -> np.ndarray:
        width = arrays[0].shape[0]
        parts = [a.T.reshape(self.kv_heads, -1, self.head_dim, width) for a in arrays]
        return np.concatenate(parts, axis=1).reshape(-1, width)


@dataclass(frozen=True)
class Rule:
    """One torch key pattern and the parameter of ours that it fills.

    torch: key, with `{i}` where the layer number stands if `layers` is given; or several keys.
    ours: "/"-joined path; or several paths. Only one side may be several.
    layers: numbers of the layers that our leading axis stacks, in order.
    """

    torch: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    op: Operation = Same()
    layers: tuple[int, ...] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The torch keys, layer number left open."""
        return self.torch if isinstance(self.torch, tuple) else (self.torch,)

    @property
    def paths(self) -> tuple[str, ...]:
        """Our paths."""
        return self.ours if isinstance(self.ours, tuple) else (self.ours,)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every torch key of the rule, layer by layer in the order of our leading axis."""
        layers = (None,) if self.layers is None else self.layers
        return tuple(key for layer in layers for key in self.layer_keys(layer))

    def layer_keys(self, layer: int | None) -> tuple[str, ...]:
        """The torch keys of the layer of this number (None where nothing is stacked)."""
        if layer is None:
            return self.patterns
        return tuple(pattern.replace("{i}", str(layer)) for pattern in self.patterns)

    def torch_shapes(self, *ours: Shape) -> tuple[Shape, ...]:
        """Shape of the tensor behind each pattern, given the shapes of our (stacked) parameters."""
        single = [tuple(shape) if self.layers is None else tuple(shape[1:]) for shape in ours]
        shapes = self.op.torch_shape(*single)
        return shapes if isinstance(self.torch, tuple) else (shapes,)

    def to_jax(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Our arrays of one layer from its torch tensors."""
        result = self.op.to_jax(*arrays)
        return result if isinstance(self.ours, tuple) else (result,)

    def to_torch(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """The torch tensors of one layer from our arrays."""
        result = self.op.to_torch(*arrays)
        return result if isinstance(self.torch, tuple) else (result,)


def check(
    rules: Iterable[Rule],
    torch_shapes: Mapping[str, Shape],
    our_shapes: Mapping[str, Shape],
    ignore: Iterable[str] = (),
    what: str = "the checkpoint",
) -> None:
    """Raises MappingError unless rules, checkpoint and model fit one another exactly.

    torch_shapes: shape of every tensor of the checkpoint. our_shapes: shape of every parameter of
    the model by path. ignore: regular expressions of whole keys that need no place. what: the
    subject of the message.
    """
    rules = tuple(rules)
    expected: dict[str, Shape] = {}
    problems = []
    for rule in rules:
        absent = [path for path in rule.paths if path not in our_shapes]
        if absent:
            for path in absent:
                problems.append(f"the model has no {path} for {' and '.join(rule.patterns)}")
            continue
        ours = [our_shapes[path] for path in rule.paths]
        for path, shape in zip(rule.paths, ours, strict=True):
            if rule.layers is not None and shape[:1] != (len(rule.layers),):
                problems.append(f"{path} {shape} does not stack {len(rule.layers)} layers")
        expected.update(_torch_shapes(rule, ours))
    keys = Counter(key for rule in rules for key in rule.keys)
    paths = Counter(path for rule in rules for path in rule.paths)
    for counts in (keys, paths):
        problems += [f"{name} has {n} rules" for name, n in counts.items() if n > 1]
    problems += [f"{path} has no rule" for path in our_shapes if path not in paths]

    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    missing = [key for key in expected if key not in torch_shapes]
    unexpected = [k for k in torch_shapes if k not in keys and not ignored.fullmatch(k)]
    misshaped = {
        f"{key}: has {tuple(torch_shapes[key])}, needs {shape}": key
        for key, shape in expected.items()
        if key in torch_shapes and tuple(torch_shapes[key]) != shape
    }
    sections = [
        ("no rule fits", problems),
        ("missing", missing),
        ("unexpected", unexpected),
        ("of the wrong shape", list(misshaped)),
    ]
    text = [
        f"{title} ({len(lines)}):\n    " + "\n    ".join(_grouped(lines))
        for title, lines in sections
        if lines
    ]
    if text:
        raise MappingError(f"{what}: names and shapes do not fit the model\n  " + "\n  ".join(text))


def _torch_shapes(rule: Rule, ours: Iterable[Shape]) -> dict[str, Shape]:
    """{key: shape} of every torch tensor of a rule."""
    shapes = rule.torch_shapes(*ours)
    return dict(zip(rule.keys, shapes * (len(rule.keys) // len(shapes)), strict=True))


def _grouped(lines: list[str]) -> list[str]:
    """Lines that differ only in the layer number become one, with the numbers behind it."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        layer = re.search(r"\.(\d+)\.", line)
        template = line[: layer.start()] + ".{i}." + line[layer.end() :] if layer else line
        groups.setdefault(template, []).append(layer.group(1) if layer else "")
    return [
        template if layers == [""] else f"{template}   i = {', '.join(layers)}"
        for template, layers in groups.items()
    ]


@dataclass(frozen=True)
class Leaf:
    """One of our parameters, not yet read.

    read() gives the whole array; read(index) with a tuple of slices gives a part and touches only
    the torch tensors of the layers in it, which is what `jax.make_array_from_callback` asks for.
    """

    rule: Rule
    path: str
    source: Mapping[str, np.ndarray]
    shape: Shape
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        index = (slice(None),) * len(self.shape) if index is None else index
        if self.rule.layers is None:
            # A copy, because a device may otherwise go on reading the mapped file.
            part = self._of_layer(None)[index]
            return _copied(part, np.empty(part.shape, self.dtype))
        layers = self.rule.layers[index[0]]
        result = None
        for n, layer in enumerate(layers):
            part = self._of_layer(layer)[index[1:]]
            if result is None:
                result = np.empty((len(layers), *part.shape), self.dtype)
            _copied(part, result[n : n + 1].reshape(part.shape))
        return result

    def _of_layer(self, layer: int | None) -> np.ndarray:
        arrays = self.rule.to_jax(*(self.source[key] for key in self.rule.layer_keys(layer)))
        return arrays[self.rule.paths.index(self.path)]


def _copied(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`target`, filled from `source`; a transposed view goes in blocks that fit a core's cache."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return target
    for start in range(0, source.shape[1], _BLOCK):
        target[:, start : start + _BLOCK] = source[:, start : start + _BLOCK]
    return target


def leaves(
    rules: Iterable[Rule],
    source: Mapping[str, np.ndarray],
    specs: Mapping[str, Spec],
    our_shapes: Mapping[str, Shape],
    dtype=None,
) -> Iterator[tuple[str, Leaf]]:
    """Gives (path, Leaf) for each rule, to be read one by one; `check` first.

    Floating-point parameters become `dtype`, or keep the checkpoint's own where it is None.
    """
    for rule in rules:
        own = _cast_to(_promoted([specs[key].dtype for key in rule.keys]), dtype)
        for path in rule.paths:
            yield path, Leaf(rule, path, source, tuple(our_shapes[path]), own)


def _promoted(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype that holds the values of every layer without loss."""
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = result if dtype == result else np.dtype(jnp.promote_types(result, dtype))
    return result


def _cast_to(own, dtype) -> np.dtype:
    cast = dtype is not None and jnp.issubdtype(own, jnp.floating)
    return np.dtype(dtype) if cast else np.dtype(own)


class TorchTensors:
    """Our parameters seen as torch tensors under torch keys.

    A parameter is an array, or has `shape`, `dtype` and `read(index)` as `Leaf` has.

    specs: {key: Spec}, known without reading anything.
    read(key): the tensor as a contiguous numpy array; only its own layer leaves the device.
    """

    def __init__(self, rules: Iterable[Rule], parameters: Mapping[str, jnp.ndarray], dtype=None):
        """parameters: {path: array}. Floating-point tensors become `dtype` unless it is None."""
        self.specs: dict[str, Spec] = {}
        self._parameters = parameters
        self._places: dict[str, tuple[Rule, int | None, int]] = {}
        for rule in rules:
            arrays = [parameters[path] for path in rule.paths]
            own = _cast_to(_promoted([array.dtype for array in arrays]), dtype)
            shapes = rule.torch_shapes(*(array.shape for array in arrays))
            for n, layer in enumerate(rule.layers or (None,)):
                place = None if rule.layers is None else n
                for position, key in enumerate(rule.layer_keys(layer)):
                    self.specs[key] = Spec(shapes[position], own)
                    self._places[key] = (rule, place, position)

    def read(self, key: str) -> np.ndarray:
        rule, layer, position = self._places[key]
        arrays = [_on_host(self._parameters[path], layer) for path in rule.paths]
        spec = self.specs[key]
        result = rule.to_torch(*arrays)[position]
        return _copied(result, np.empty(result.shape, spec.dtype)).reshape(spec.shape)


def _on_host(array: Any, layer: int | None) -> np.ndarray:
    """An array, or its part of one layer, as numpy; what has a `read` is read only there."""
    if hasattr(array, "read"):
        rest = (slice(None),) * (len(array.shape) - 1)
        return array.read() if layer is None else array.read((slice(layer, layer + 1), *rest))[0]
    # Slicing on an accelerator moves one layer; on the host it would only cost a compilation.
    if isinstance(array, jax.Array) and next(iter(array.devices())).platform != "cpu":
        return np.asarray(array if layer is None else array[layer])
    return np.asarray(array) if layer is None else np.asarray(array)[layer]
