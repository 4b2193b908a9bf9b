"""A kernel compiled alone takes the cycles that it takes within its program."""

import json
import os
import subprocess
import sys

import pytest

from internvl_jax.plan import kernel_times

# A kernel between a product and a sum; prints its cycles within the program, then compiled alone.
PROGRAM = """
import json
from internvl_jax.plan import kernel_times, kernels, topology
folder = kernels.keep_schedules()
import jax
import jax.numpy as jnp
from internvl_jax.kernels import Causal, attention

def run(q, k, w):
    mixed = attention(jnp.tanh(q @ w), k, k, mask=Causal(), implementation="pallas_tpu")
    return jnp.sum(mixed.astype(jnp.float32))

with topology.opened("v5e:2x2") as devices:
    mesh = jax.sharding.Mesh(devices[:1], "device")
    place = jax.sharding.NamedSharding(mesh, jax.P())
    q = jax.ShapeDtypeStruct((2, 257, 4, 128), jnp.bfloat16, sharding=place)
    k = jax.ShapeDtypeStruct((2, 257, 2, 128), jnp.bfloat16, sharding=place)
    w = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=place)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(run, argnums=(0, 1)))
        text = step.trace(q, k, w).lower(lowering_platforms=("tpu",)).compile().as_text()
    within = kernels.cycles(folder, text)
    print(json.dumps([within, kernel_times.cycles(text, "v5e:2x2")]))
"""


@pytest.mark.slow
def test_a_kernel_alone_takes_the_same_cycles():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    within, alone = json.loads(done.stdout.splitlines()[-1])
    assert len(within) == 2, "the forward and the backward"
    # Where operands lie differs, which changes a few address computations.
    assert alone == pytest.approx(within, rel=0.01)


def test_a_program_without_kernels_starts_no_compiler():
    assert kernel_times.cycles("HloModule plain\n", "v5e:2x2") == {}


def test_what_cannot_be_read_is_left_out():
    """An operand of a type that has no name here, and a call without its code."""
    target = 'custom_call_target="tpu_custom_call"'
    odd = "operand_layout_constraints={f8e4m3[8]{0}}, backend_config={}"
    program = (
        f"  %odd.1 = f32[8]{{0}} custom-call(%x), {target}, {odd}\n"
        f"  %bare.2 = f32[8]{{0}} custom-call(%x), {target}\n"
    )
    assert kernel_times.cycles(program, "v5e:2x2") == {}
