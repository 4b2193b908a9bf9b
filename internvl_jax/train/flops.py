"""Model FLOPs of a function, counted in its program rather than from a formula per model.

Only matrix products and convolutions count, two operations per multiply-add, as is usual for model
FLOPs utilisation (Chowdhery et al. 2022, appendix B). Trace without rematerialisation, so that
recomputed layers do not count as work of the model.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from internvl_jax import kernels, objectives
from internvl_jax.models import config as models
from internvl_jax.models import init
from internvl_jax.train.gradients import value_and_grad
from internvl_jax.train.step import example_keys

# Options of an objective that compute something twice, to save memory or to choose negatives.
_SAVINGS = ("ring", "vocabulary_slices", "itm_negatives")


def of_step(config: Any, state: Any, batch: Any) -> float:
    """Model FLOPs of one train step of an experiment, over all devices.

    state, batch: arrays or shapes with shardings. What is computed twice to save memory counts
    once: without rematerialisation, in one pass, with the plain losses and plain attention, which
    counts in full even where a mask leaves half of it out.
    """
    bind = functools.partial(init.bind, models.from_dict({**config.model, "remat": "none"}))
    options = {n: v for n, v in config.objective_options.items() if n not in _SAVINGS}
    objective = objectives.OBJECTIVES[config.objective](**options)
    keys = jax.eval_shape(functools.partial(example_keys, config.seed, 0), batch)
    one_pass = functools.partial(value_and_grad, objective, bind)
    with kernels.plain():
        return count(one_pass, state.trainable, state.frozen, batch, keys)


def parts_of_step(config: Any, state: Any, batch: Any) -> tuple[float, float]:
    """Model FLOPs of a step per square and per token, where rows hold padding of both.

    batch: with "image" [B, M, …] and "tokens" [B, L]. Attention counts as in rows without padding,
    so of a packed row a little more than its conversations need.
    """
    image = batch["image"]
    rows, squares, *rest = image.shape
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), dict(batch)
    )
    wider = jax.ShapeDtypeStruct((rows, squares + 1, *rest), image.dtype, sharding=image.sharding)
    whole = of_step(config, state, shapes)
    per_square = (of_step(config, state, {**shapes, "image": wider}) - whole) / rows
    return per_square, (whole - per_square * rows * squares) / batch["tokens"].size


def count(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of one call over all devices; arguments may be shapes. Traces, compiles nothing.

    The body of a while loop counts once, since its number of turns is not known; a Pallas kernel
    counts nothing, so trace the reference implementation instead.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(program: Any) -> float:
    total = 0.0
    for equation in program.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(left[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            size = math.prod(equation.outvars[0].aval.shape)
            total += 2 * size * math.prod(kernel) / features
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in parameters["branches"])
        elif name != "pallas_call":
            inner = sum(_count(part) for part in _programs_in(parameters))
            if name == "scan":
                inner *= parameters["length"]
            elif name == "shard_map":
                inner *= _different_devices(parameters)  # its shapes are those of one device
            total += inner
    return total


def _different_devices(parameters: dict[str, Any]) -> int:
    """Devices that do different work in a `shard_map`; over the other mesh axes they repeat it."""
    specs = (*parameters["in_specs"], *parameters["out_specs"])
    named = {axis for spec in specs for axes in spec for axis in _axes(axes)}
    return math.prod(parameters["mesh"].shape[axis] for axis in named)


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _programs_in(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        program = getattr(value, "jaxpr", value)  # a closed one holds its constants beside it
        if hasattr(program, "eqns"):
            yield program
