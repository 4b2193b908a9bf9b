"""Compiling for devices that only the compiler knows, where running out of memory is an answer."""

import re
import time
from typing import Any

import jax

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class OutOfMemory(RuntimeError):
    """The program does not fit; `needed` bytes per device, found after `seconds`."""

    def __init__(self, needed: float, seconds: float):
        super().__init__(f"the program needs {needed / 2**30:.2f} GiB per device")
        self.needed, self.seconds = needed, seconds


def compiled(
    step: Any, arguments: tuple[Any, ...], mesh: jax.sharding.Mesh, argument_bytes: float
) -> tuple[Any, float]:
    """(compiled program, seconds it took) of a jitted function.

    argument_bytes: of the arguments on one device.

    Raises:
        OutOfMemory: it does not fit the devices' memory.
    """
    started = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            traced = step.trace(*arguments)
            program = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = needed_bytes(str(error), argument_bytes)
        raise OutOfMemory(needed, time.monotonic() - started) from error
    return program, time.monotonic() - started


def needed_bytes(message: str, arguments: float) -> float:
    """Bytes of HBM that a program would have needed, from the compiler's out-of-memory message.

    arguments: bytes to add where the message speaks of temporaries alone.
    """
    used = re.search(r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)", message)
    found = used or temporaries
    if not found:
        raise ValueError(f"the compiler's out-of-memory message names no size: {message[:300]}")
    size = float(found.group(1)) * _UNITS[found.group(2)]
    return size if used else size + arguments
