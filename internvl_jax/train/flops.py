"""Model FLOPs of a function, counted in its program rather than from a formula per model.

Only matrix products and convolutions count, two operations per multiply-add, as is usual for model
FLOPs utilisation (Chowdhery et al. 2022, appendix B). Trace without rematerialisation, so that
recomputed layers do not count as work of the model.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


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
                inner *= parameters["mesh"].size  # its shapes are those of one device
            total += inner
    return total


def _programs_in(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        program = getattr(value, "jaxpr", value)  # a closed one holds its constants beside it
        if hasattr(program, "eqns"):
            yield program
