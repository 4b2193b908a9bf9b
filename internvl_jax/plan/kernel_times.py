"""Cycles of a program's Pallas kernels, each distinct one compiled alone with its schedule written.

The compiler writes schedules only for a whole process and then of every fusion, which doubles the
time that a large program takes. A process of its own compiles nothing but the kernels, in seconds.
Results that lie in vector memory within the program do so there too.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from internvl_jax.plan import kernels

_CALL = re.compile(
    r"= (?P<results>.*?) custom-call\("
    r".*?operand_layout_constraints=\{(?P<operands>(?:[^{}]|\{[^{}]*\})*)\}",
    re.DOTALL,
)
_CONFIG = "backend_config="
# What the compiler adds to the configuration that the kernel came with.
_ADDED = ("used_scoped_memory_configs", "retry_config", "aliasing_operands")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_RESULT = re.compile(r"([a-z]\w*\[[\d,]*\])(\{[^{}]*\})?")
_IN_VECTOR_MEMORY = "S(1)"
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32"} | {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name in (("s", "int"), ("u", "uint"))
    for bits in (8, 16, 32)
}


def cycles(program: str, topology: str) -> dict[str, int]:
    """Issue cycles of one call of each Pallas kernel, by its instruction in the program's text.

    program: `Compiled.as_text()` of a program for a chip of `topology`. A kernel that does not
    compile alone is left out, and said so on standard error.
    """
    wanted = {name: call for name, text in kernels.calls(program) if (call := _parsed(text))}
    if not wanted:
        return {}
    counts = _compiled(tuple(dict.fromkeys(wanted.values())), topology)
    return {name: counts[call] for name, call in wanted.items() if call in counts}


def _parsed(text: str) -> str | None:
    """One call as JSON: configuration, operands and results; None where the text lacks a part."""
    call, start = _CALL.search(text), text.find(_CONFIG)
    if call is None or start < 0:
        return None
    config, _ = json.JSONDecoder().raw_decode(text, start + len(_CONFIG))
    kept = {key: value for key, value in config.items() if key not in _ADDED}
    arrays = {part: _arrays(call.group(part)) for part in ("operands", "results")}
    if None in arrays.values():
        return None
    near = [_IN_VECTOR_MEMORY in layout for _, layout in _RESULT.findall(call.group("results"))]
    return json.dumps({"config": json.dumps(kept), **arrays, "near": near})


def _arrays(text: str) -> list[tuple[str, list[int]]] | None:
    """(type, shape) of each array, in order; None for types that this does not know."""
    found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text))  # layouts hold no arrays
    if any(dtype not in _DTYPES for dtype, _ in found):
        return None
    return [(_DTYPES[dtype], [int(n) for n in dims.split(",") if n]) for dtype, dims in found]


@functools.lru_cache(maxsize=64)
def _compiled(calls: Sequence[str], topology: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", __name__, topology],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    # The program took minutes to compile, and all but its time is known without its kernels.
    counts = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    if len(counts) < len(calls):
        missing = f"{len(calls) - len(counts)} of {len(calls)} kernels have no schedule"
        print(f"{missing}: {done.stderr.strip()[-500:]}", file=sys.stderr, flush=True)
    return {calls[int(number)]: count for number, count in counts.items()}


def _main(topology: str) -> None:
    """Calls as JSON on standard input; {number of the call: cycles} as JSON on standard output.

    The process that waits for this one holds the lock of the compiler.
    """
    calls = [json.loads(call) for call in json.load(sys.stdin)]
    folder = kernels.keep_schedules()  # before libtpu loads

    import jax

    from internvl_jax.plan import topology as topologies

    mesh = jax.sharding.Mesh(topologies.devices(topology)[:1], "device")
    place = jax.sharding.NamedSharding(mesh, jax.P())
    counts = {}
    with jax.set_mesh(mesh):
        for number, call in enumerate(calls):
            kernels.clear(folder)
            try:
                program = _alone(call, place).compile().as_text()
            except jax.errors.JaxRuntimeError as error:
                print(f"kernel {number}: {error}", file=sys.stderr)
                continue
            found = list(kernels.cycles(folder, program).values())
            if found:
                counts[number] = found[0]
    print(json.dumps(counts))


def _alone(call: dict[str, Any], place: Any) -> Any:
    """A program of nothing but one call, lowered."""
    import jax
    import jax.numpy as jnp

    results = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in call["results"]]
    kernel = jax.ffi.ffi_call(
        "tpu_custom_call",
        results,
        custom_call_api_version=1,
        legacy_backend_config=call["config"],
        has_side_effect=True,  # or unused results would remove it
    )
    operands = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype, shape in call["operands"]
    ]

    def program(*operands):
        # The compiler keeps in vector memory what is read at once, and schedules a kernel for it.
        found = zip(kernel(*operands), call["near"], strict=True)
        return [jnp.max(x) if near else x for x, near in found]

    return jax.jit(program).trace(*operands).lower(lowering_platforms=("tpu",))


if __name__ == "__main__":
    _main(sys.argv[1])
