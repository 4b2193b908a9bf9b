"""Tables that say which torch tensor is which of our parameters, used in both directions.

A layout is a tuple of `Rule`s. A rule names one torch key, our path, and the operation that turns
one array into the other. With `layers`, the key contains `{i}` and our parameter has a leading
axis that stacks those layers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.convert.safetensors_files import Spec

Shape = tuple[int, ...]


class MappingError(ValueError):
    """Keys or shapes of a checkpoint that do not fit the model; the message lists all of them."""


class Operation(Protocol):
    """How one torch tensor becomes one of our arrays (of one layer, where layers are stacked)."""

    def torch_shape(self, ours: Shape) -> Shape: ...
    def to_jax(self, array: np.ndarray) -> np.ndarray: ...
    def to_torch(self, array: np.ndarray) -> np.ndarray: ...


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
class Rule:
    """One torch key pattern and the parameter of ours that it fills.

    torch: key, with `{i}` where the layer number stands if `layers` is given.
    ours: "/"-joined path.
    layers: numbers of the layers that our leading axis stacks, in order.
    """

    torch: str
    ours: str
    op: Operation = Same()
    layers: tuple[int, ...] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """Every torch key of the rule, in the order of our leading axis."""
        if self.layers is None:
            return (self.torch,)
        return tuple(self.torch.replace("{i}", str(i)) for i in self.layers)

    def torch_shape(self, ours: Shape) -> Shape:
        """Shape of each torch tensor, given the shape of our (stacked) parameter."""
        return self.op.torch_shape(tuple(ours) if self.layers is None else tuple(ours[1:]))


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
        ours = our_shapes.get(rule.ours)
        if ours is None:
            problems.append(f"the model has no {rule.ours} for {rule.torch}")
            continue
        if rule.layers is not None and ours[:1] != (len(rule.layers),):
            problems.append(f"{rule.ours} {ours} does not stack {len(rule.layers)} layers")
        expected.update(dict.fromkeys(rule.keys, rule.torch_shape(ours)))
    keys = Counter(key for rule in rules for key in rule.keys)
    paths = Counter(rule.ours for rule in rules)
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
    source: Mapping[str, np.ndarray]
    shape: Shape
    dtype: np.dtype

    def read(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        index = (slice(None),) * len(self.shape) if index is None else index
        if self.rule.layers is None:
            # A copy, because a device may otherwise go on reading the mapped file.
            part = self.rule.op.to_jax(self.source[self.rule.torch])[index]
            return np.array(part, self.dtype, order="C")
        keys = self.rule.keys[index[0]]
        result = None
        for n, key in enumerate(keys):
            part = self.rule.op.to_jax(self.source[key])[index[1:]]
            if result is None:
                result = np.empty((len(keys), *part.shape), self.dtype)
            result[n] = part
        return result


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
        own = _promoted([specs[key].dtype for key in rule.keys])
        yield rule.ours, Leaf(rule, source, tuple(our_shapes[rule.ours]), _cast_to(own, dtype))


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

    specs: {key: Spec}, known without reading anything.
    read(key): the tensor as a contiguous numpy array; only its own layer leaves the device.
    """

    def __init__(self, rules: Iterable[Rule], parameters: Mapping[str, jnp.ndarray], dtype=None):
        """parameters: {path: array}. Floating-point tensors become `dtype` unless it is None."""
        self.specs: dict[str, Spec] = {}
        self._parameters = parameters
        self._places: dict[str, tuple[Rule, int | None]] = {}
        for rule in rules:
            array = parameters[rule.ours]
            spec = Spec(rule.torch_shape(array.shape), _cast_to(array.dtype, dtype))
            for n, key in enumerate(rule.keys):
                self.specs[key] = spec
                self._places[key] = (rule, None if rule.layers is None else n)

    def read(self, key: str) -> np.ndarray:
        rule, layer = self._places[key]
        array = self._parameters[rule.ours]
        # Slicing on an accelerator moves one layer; on the host it would only cost a compilation.
        if isinstance(array, jax.Array) and next(iter(array.devices())).platform != "cpu":
            array = array if layer is None else array[layer]
            layer = None
        array = np.asarray(array) if layer is None else np.asarray(array)[layer]
        spec = self.specs[key]
        return np.ascontiguousarray(rule.op.to_torch(array), spec.dtype).reshape(spec.shape)
