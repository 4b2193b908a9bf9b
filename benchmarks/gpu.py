"""InternViT-6B on one NVIDIA GPU beside the same tower in PyTorch, taking turns in one run.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json

Forward: 48 layers, 128 images of 224 pixels, bfloat16 weights. Train step: 12 of the 48 layers, so
that all states fit one card, 32 images; float32 weights and AdamW moments, bfloat16 products, each
layer computed again in the backward pass. PyTorch uses its scaled dot-product attention (the flash
kernel where it has one), once as it is and once with every layer compiled. Both have the same
weights, and the outputs are compared first. Utilisation is of the card's dense bfloat16 peak, and
counts three forward passes for a train step. Needs jax[cuda], flax, optax, and torch for the peer;
without torch only our times are printed.

    python benchmarks/gpu.py --cpu      (a tower of two narrow layers: whether the script works)
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Two frameworks share the card: neither may take all of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from turns import alternate, forward_flops

from internvl_jax.models import VisionConfig, bind, create
from internvl_jax.models.config import VITS, ViTConfig
from internvl_jax.train.metrics import PEAK_FLOPS

SMALL = ViTConfig(width=64, depth=2, num_heads=4, mlp_dim=128, image_size=56, patch_size=14)
RATE, WEIGHT_DECAY = 1e-4, 1e-4
PEERS = ("torch", COMPILED := "torch compiled")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
# Of the largest output: bfloat16 rounds to 2⁻⁸, in 48 layers in a different order.
TOLERANCE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128, help="images of the forward pass")
    parser.add_argument("--train-batch", type=int, default=32, help="images of a train step")
    parser.add_argument("--train-depth", type=int, default=12, help="layers of the train step")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    parser.add_argument("--cpu", action="store_true", help="a small tower, without a GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not args.cpu:
        raise SystemExit(f"error: JAX sees no GPU, only a {device.platform}; see --cpu")

    tower = SMALL if args.cpu else dataclasses.replace(VITS["6b"], dtype="bfloat16")
    shorter = dataclasses.replace(tower, depth=min(args.train_depth, tower.depth), remat="full")
    batches = {"forward": args.batch, "train step": args.train_batch}
    if args.cpu:
        batches = {what: min(batch, 4) for what, batch in batches.items()}
    work = {
        "forward": forward_flops(tower, batches["forward"]),
        "train step": 3 * forward_flops(shorter, batches["train step"]),
    }
    medians = {
        "forward": alternate(forwards(tower, batches["forward"]), args.rounds),
        "train step": alternate(train_steps(shorter, batches["train step"]), args.rounds),
    }
    peak = PEAK_FLOPS.get(device.device_kind)
    figures = {
        "device": device.device_kind,
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "layers": {"forward": tower.depth, "train step": shorter.depth},
        "batch": batches,
        "median_seconds": medians,
        "images_per_second": {
            what: {name: batches[what] / seconds for name, seconds in times.items()}
            for what, times in medians.items()
        },
        "utilisation": peak
        and {
            what: {name: work[what] / seconds / peak for name, seconds in times.items()}
            for what, times in medians.items()
        },
    }
    print(table(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def forwards(tower: ViTConfig, batch: int) -> dict[str, Callable[[], Any]]:
    """The forward pass of each contender; a call waits for its result."""
    config = VisionConfig(tower)
    make = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(tower.dtype), create(config, key)))
    params = make(jax.random.key(0))
    pixels = images(tower, batch)
    ours = jax.jit(lambda p, x: bind(config, p).vision(x))
    on_device = jnp.asarray(pixels)
    runs = {"jax": lambda: jax.block_until_ready(ours(params, on_device))}
    if not has_torch():
        return runs
    import torch_tower

    wanted = np.asarray(runs["jax"](), np.float32)
    for name in PEERS:
        model, there = torch_tower.build(tower, params, pixels, compiled=name == COMPILED)
        runs[name] = torch_tower.forward(model, there, tower.dtype)
        found = runs[name]().float().cpu().numpy()
        difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if not difference < TOLERANCE:
            raise SystemExit(f"error: {name} differs by {difference:.2g} of the largest output")
    return runs


def train_steps(tower: ViTConfig, batch: int) -> dict[str, Callable[[], Any]]:
    """An AdamW update of each contender towards tokens of zero."""
    config = VisionConfig(tower)
    params = jax.jit(functools.partial(create, config))(jax.random.key(0))
    pixels = images(tower, batch)
    peers = {}
    if has_torch():
        import torch_tower

        for name in PEERS:
            model, there = torch_tower.build(tower, params, pixels, compiled=name == COMPILED)
            peers[name] = torch_tower.train_step(model, there, RATE, WEIGHT_DECAY)

    tx = optax.adamw(RATE, weight_decay=WEIGHT_DECAY)
    state = [params, jax.jit(tx.init)(params)]
    del params
    on_device = jnp.asarray(pixels)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, moments, x):
        def loss_of(params):
            return jnp.mean(jnp.square(bind(config, params).vision(x).astype(jnp.float32)))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def ours():
        *state[:], loss = update(*state, on_device)
        return float(loss)

    return {"jax": ours, **peers}


def images(tower: ViTConfig, batch: int) -> np.ndarray:
    shape = (batch, tower.image_size, tower.image_size, 3)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


# --- what is printed -----------------------------------------------------------------------------


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{figures['device']}, {figures['date']}, medians"]
    for what, times in figures["median_seconds"].items():
        layers, batch = figures["layers"][what], figures["batch"][what]
        lines.append(f"{what}: {layers} layers, {batch} images")
        for name, seconds in times.items():
            rate = figures["images_per_second"][what][name]
            line = f"  {name:15} {seconds * 1e3:9.1f} ms {rate:8.1f} images/s"
            if figures["utilisation"]:
                line += f"  {100 * figures['utilisation'][what][name]:5.1f} % of the peak"
            lines.append(f"{line}  {seconds / times['jax']:5.2f} × our time")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
