"""The first hour on a new machine: attention, every stage tiny, and steps of a real size.

    python launch/smoke.py --config=stage1_contrastive --topology=v5e:4x4

1. Every implementation of attention against the reference in float32, with gradients, at the shapes
   of InternViT-6B and LLaMA-7B.
2. Every stage `:tiny`, through the train loop, with its checkpoints.
3. A few train steps of `--config` on invented data of the real shapes, its global batch scaled to
   the devices that are here: measured step time and memory beside what `internvl-jax plan` says for
   `--topology`, and a profile to open in TensorBoard.

Run it on every host of a slice at once (launch/tpu_smoke.sh). Exit code 1 if attention is off or a
loss is not finite.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import configuration
from internvl_jax.kernels.attention import IMPLEMENTATIONS, attention
from internvl_jax.kernels.masks import Causal, Full
from internvl_jax.plan import experiment
from internvl_jax.sharding import platform
from internvl_jax.train import loop, processes

STAGES = (
    "stage1_contrastive:tiny",
    "stage2_generative:tiny",
    "stage3_sft:projector,tiny",
    "stage3_sft:tiny",
    "finetune_retrieval:tiny",
)
# (name, [B, T, H, D] of queries, heads of keys, mask)
SHAPES = (
    ("InternViT-6B, 224 px", (1, 257, 25, 128), 25, Full()),
    ("LLaMA-7B", (1, 512, 32, 128), 32, Causal()),
    ("grouped queries", (1, 512, 32, 128), 8, Causal()),
)
TOLERANCE = 1e-4  # float32 with full products; values and gradients are of order 1
PAPER_CHIPS = 256  # over which the paper-size configs divide their batch
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="stage1_contrastive", help="of the steps of real size")
    parser.add_argument("--topology", help="what these chips are, as v5e:4x4; to plan beforehand")
    parser.add_argument("--profile", default="runs/smoke/profile", help="folder for the profile")
    args = parser.parse_args()
    # Before this process takes the chips: the plan needs the compiler of the same library.
    planned = plan(args.config, args.topology) if args.topology else {}
    with processes.joined():
        device = jax.devices()[0]
        processes.say(f"{jax.device_count()} × {device.device_kind} ({device.platform})")
        if device.platform != "tpu":
            processes.say("this is not a TPU: times and memory below say nothing about one")
        checked = check_attention()
        run_stages()
        finite = run_steps(args.config, planned, Path(args.profile))
    if not (checked and finite):
        sys.exit(1)


def plan(config: str, topology: str) -> dict[str, Any]:
    """What `internvl-jax plan` prints last, of the same steps as `run_steps`."""
    chips = math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    command = ["plan", f"--config={config}", f"--topology={topology}", "--json"]
    command += [f"--config.batch_size={scaled_batch(configuration.load(config), chips)}"]
    words = [sys.executable, "-m", "internvl_jax.cli", *command]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        print(f"no plan: {result.stderr.strip()}", file=sys.stderr)
        return {}
    print(result.stdout)
    return json.loads(result.stdout.splitlines()[-1])


def check_attention() -> bool:
    """Compare all implementations with the reference, and say by how much they differ."""
    fine = True
    for name, shape, key_heads, mask in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        query = jax.random.normal(keys[0], shape)
        key, value = (jax.random.normal(k, (*shape[:2], key_heads, shape[3])) for k in keys[1:])
        wanted = with_gradients(query, key, value, mask, "reference")
        for implementation, entry in IMPLEMENTATIONS.items():
            elsewhere = entry.platforms and platform() not in entry.platforms
            reason = entry.supports(query, key, value, mask)
            if elsewhere or reason:
                processes.say(f"attention {implementation:10} {name:22} {reason or 'elsewhere'}")
                continue
            found = with_gradients(query, key, value, mask, implementation)
            worst = max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))
            verdict = "ok" if worst <= TOLERANCE else "OFF"
            fine &= worst <= TOLERANCE
            processes.say(f"attention {implementation:10} {name:22} {worst:.1e} {verdict}")
    return fine


def with_gradients(query, key, value, mask, implementation: str) -> list[np.ndarray]:
    def summed(query, key, value):
        out = attention(query, key, value, mask=mask, implementation=implementation)
        return jnp.sum(jnp.sin(out)), out

    with jax.default_matmul_precision("float32"):
        compute = jax.jit(jax.value_and_grad(summed, argnums=(0, 1, 2), has_aux=True))
        (_, out), gradients = compute(query, key, value)
    return [np.asarray(x) for x in (out, *gradients)]


def run_stages() -> None:
    """Each stage for its few tiny steps; an error ends the program."""
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as own:
            # All processes need one directory; that of process 0, if they share a disk.
            folder = Path(processes.first(own)) / "run"
            config = configuration.load(stage)
            config.batch_size = math.lcm(config.batch_size, jax.device_count())
            last = loop.train(config, folder)
            processes.say(f"{stage}: loss {last['loss']:.3f}")


def run_steps(name: str, planned: dict[str, Any], profile: Path) -> bool:
    """Steps of real size, measured beside the plan; False if the loss is not finite."""
    config = configuration.load(name)
    config.batch_size = scaled_batch(config, jax.device_count())
    built = experiment.build(config, jax.devices())
    processes.say(f"{name}, batch {config.batch_size:,}, mesh {dict(built.mesh.shape)}")
    with jax.set_mesh(built.mesh):
        state, batch = (filled(tree) for tree in built.arguments)
        seconds = []
        for number in range(STEPS):
            if number == STEPS - 1:
                jax.profiler.start_trace(profile)
            start = time.monotonic()
            state, metrics = built.step(state, batch)
            loss = float(metrics["loss"])  # waits for the step
            seconds.append(time.monotonic() - start)
        jax.profiler.stop_trace()
    memory = jax.local_devices()[0].memory_stats() or {}
    peak = memory.get("peak_bytes_in_use")
    measured = sorted(seconds[1:-1])[len(seconds[1:-1]) // 2]  # neither compiling nor profiled
    processes.say(f"loss            {loss:.4f}")
    processes.say(beside("seconds a step", measured, planned.get("estimated_step_s")))
    processes.say(beside("GiB a chip", peak and peak / 2**30, planned.get("peak_gib")))
    processes.say(f"profile         {profile} (tensorboard --logdir={profile})")
    return math.isfinite(loss)


def beside(what: str, measured: float | None, planned: float | None) -> str:
    known = f"{measured:.3f}" if measured else "not reported by this device"
    return f"{what:15} {known}" + (f", planned {planned:.3f}" if planned else ", no plan")


def scaled_batch(config: Any, devices: int) -> int:
    """The share of the config's batch that falls on so many of `PAPER_CHIPS` chips."""
    if config.batch_size < PAPER_CHIPS:  # a tiny config
        return math.lcm(config.batch_size, devices)
    return config.batch_size // PAPER_CHIPS * devices


def filled(shapes: Any) -> Any:
    """Arrays of these shapes and shardings, made on the devices: small numbers, valid token ids."""

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 1
        make = functools.partial(jnp.full, leaf.shape, value, leaf.dtype)
        return jax.jit(make, out_shardings=leaf.sharding)()

    return jax.tree.map(fill, shapes)


if __name__ == "__main__":
    main()
