"""Our vision tower on a CPU beside the same one in PyTorch, forward and forward with backward.

    python benchmarks/vs_torch.py --json benchmarks/results/vs_torch.json

InternViT of width 768, depth 12, with QK-norm, 8 images of 224 pixels, float32, the same weights as
`transformers`' InternVL vision model with eager and with SDPA attention. The outputs are compared
first; then the three take turns, so that what else the machine does strikes all alike. A product of
the MLP's shape takes its turns too, in both libraries: the tower's products at the better of these
two rates are a bound on how much faster than PyTorch any program can be here. Needs the extra
[torch].
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from turns import alternate, forward_flops

from internvl_jax.convert import hf
from internvl_jax.convert.mapping import TorchTensors
from internvl_jax.models import VisionConfig, bind, create
from internvl_jax.models.config import ViTConfig
from internvl_jax.rules import flatten

TOWER = ViTConfig(width=768, depth=12, num_heads=12, mlp_dim=3072, image_size=224, patch_size=14)
ATTENTIONS = ("eager", "sdpa")
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "numpy")
WORK = {"forward": 1, "forward and backward": 3}  # passes over the products
TOLERANCE = 1e-3  # of outputs of a random tower of 12 layers, whose values reach about 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=11, help="turns of each; default: %(default)s"
    )
    parser.add_argument("--unroll", type=int, default=1, help="layers per step of our scan")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    figures = measure(args.batch, args.rounds, args.unroll)
    print(table(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(batch: int, rounds: int, unroll: int) -> dict[str, Any]:
    """Compare outputs, then time: medians in seconds and their ratios to ours."""
    torch.set_num_threads(os.cpu_count())
    config = VisionConfig(ViTConfig(**{**vars(TOWER), "unroll": unroll}))
    params = create(config, jax.random.key(0))
    size = TOWER.image_size
    pixels = np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)

    ours = ours_of(config, params, jnp.asarray(pixels))
    theirs = {name: torch_of(config, params, pixels, name) for name in ATTENTIONS}
    reference = ours["forward"]()
    for name, runs in theirs.items():
        difference = float(np.abs(runs["forward"]() - reference).max())
        if difference > TOLERANCE:
            raise SystemExit(f"outputs differ from PyTorch ({name}) by {difference:.2g}")

    contenders = {"jax": ours, **{f"torch {name}": runs for name, runs in theirs.items()}}
    medians = {
        what: alternate({name: runs[what] for name, runs in contenders.items()}, rounds)
        for what in WORK
    }
    tokens = batch * (1 + (size // TOWER.patch_size) ** 2)
    rates = {
        name: 2 * tokens * TOWER.width * TOWER.mlp_dim / seconds
        for name, seconds in alternate(products(tokens), 5 * rounds).items()
    }
    whole = forward_flops(TOWER, batch) / max(rates.values())
    least = {what: passes * whole for what, passes in WORK.items()}
    return {
        "tower": {"width": TOWER.width, "depth": TOWER.depth, "batch": batch, "unroll": unroll},
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "median_seconds": medians,
        "times_as_fast": {
            what: {name: value / times["jax"] for name, value in times.items() if name != "jax"}
            for what, times in medians.items()
        },
        "product_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "products_alone_seconds": least,
        "at_most_times_as_fast": {
            what: {name: t / least[what] for name, t in times.items() if name != "jax"}
            for what, times in medians.items()
        },
    }


def products(tokens: int) -> dict[str, Callable[[], Any]]:
    """[tokens, width] · [width, mlp_dim] in both libraries."""
    generator = np.random.default_rng(1)
    left = generator.standard_normal((tokens, TOWER.width), np.float32)
    right = generator.standard_normal((TOWER.width, TOWER.mlp_dim), np.float32)
    multiply = jax.jit(jnp.matmul)
    arrays = jnp.asarray(left), jnp.asarray(right)
    return {
        "jax": lambda: jax.block_until_ready(multiply(*arrays)),
        "torch": lambda: torch.matmul(torch.from_numpy(left), torch.from_numpy(right)),
    }


def ours_of(config: VisionConfig, params: dict, pixels: jax.Array) -> dict[str, Callable[[], Any]]:
    """Our two programs; each call waits for its result."""
    forward = jax.jit(lambda p, x: bind(config, p).vision(x))
    both = jax.jit(jax.value_and_grad(lambda p, x: jnp.mean(jnp.square(bind(config, p).vision(x)))))
    return {
        "forward": lambda: np.asarray(forward(params, pixels)),
        "forward and backward": lambda: jax.block_until_ready(both(params, pixels)),
    }


def torch_of(
    config: VisionConfig, params: dict, pixels: np.ndarray, attention: str
) -> dict[str, Callable[[], Any]]:
    """The same two programs of `transformers`, with our weights."""
    vit = config.vit
    settings = transformers.InternVLVisionConfig(
        hidden_size=vit.width,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        intermediate_size=vit.mlp_dim,
        image_size=[vit.image_size] * 2,
        patch_size=[vit.patch_size] * 2,
        norm_type="rms_norm",
        use_qk_norm=True,
        attention_bias=False,
    )
    model = transformers.InternVLVisionModel._from_config(settings, attn_implementation=attention)
    tensors = TorchTensors(hf.tower_rules(vit, ""), flatten(params))
    model.load_state_dict({key: torch.from_numpy(tensors.read(key)) for key in tensors.specs})
    model.eval()
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    def forward() -> np.ndarray:
        with torch.inference_mode():
            return model(images).last_hidden_state.numpy()

    def both() -> None:
        model.zero_grad(set_to_none=True)
        model(images).last_hidden_state.square().mean().backward()

    return {"forward": forward, "forward and backward": both}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores"


def table(figures: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{figures['tower']} on {figures['machine']}, float32, medians"]
    for what, times in figures["median_seconds"].items():
        for name, seconds in times.items():
            ratio = figures["times_as_fast"][what].get(name)
            beside = f"  {ratio:5.2f} × our time" if ratio else ""
            most = figures["at_most_times_as_fast"][what].get(name)
            beside += f", {most:5.2f} × its products alone" if most else ""
            lines.append(f"{what:22} {name:12} {seconds * 1e3:8.0f} ms{beside}")
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in figures["product_gflops"].items())
    lines.append(f"a product of the MLP's shape: {rates} GFLOP/s (products alone: at the better)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
