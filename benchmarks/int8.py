"""What int8 weights cost in accuracy, and what they save: the shipped models, and a wide tower.

    python benchmarks/int8.py --json benchmarks/results/int8.json

The first table holds the figures of the shipped checkpoints on their held-out data, with float32
and with int8 weights. The second takes two blocks of InternViT at its real width of 3200 with
random weights, and compares features and logits by their cosines. It also tells how much memory
a process takes that loads this tower in int8, beside what the loaded arrays take.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import internvl_jax
from internvl_jax.evals import evaluate
from internvl_jax.models import InternVLConfig, create, to_dict
from internvl_jax.models.config import LLAMAS, VITS
from internvl_jax.train.pretrained import save_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--load", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(loaded(args.load)))
        return
    found = {"figures": figures(), "wide": wide()}
    print(table(found))
    if args.json:
        about = {
            "command": "python benchmarks/int8.py",
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux",
        }
        Path(args.json).write_text(json.dumps({**about, **found}, indent=2) + "\n", "utf-8")


def figures() -> dict[str, dict[str, float]]:
    """{figure: {"float32": …, "int8": …}} of the shipped checkpoints."""
    found: dict[str, dict[str, float]] = {}
    for checkpoint in ("demo", "demo-chat"):
        for kind, weights in (("float32", None), ("int8", "int8")):
            model = internvl_jax.load(checkpoint, weights=weights)
            measured = evaluate.evaluate(model.config, model.params, (), model.experiment)
            for name, value in measured.items():
                found.setdefault(name, {})[kind] = float(value)
    return found


def wide() -> dict[str, float]:
    """Cosines of what a tower of real width gives with int8 weights, and the memory of loading."""
    vit = replace(VITS["6b"], depth=2, image_size=112)
    config = InternVLConfig(vit, LLAMAS["tiny"], embed_dim=768, pool_heads=16)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, vit.image_size, vit.image_size, 3), np.uint8)
    ids = rng.integers(3, 960, (16, 12), np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide"
        params = create(config, jax.random.key(0))
        save_params(path, params, config={"model": to_dict(config), "data": {}})
        del params
        features, states, logits = {}, {}, {}
        for kind, weights in (("float32", None), ("int8", "int8")):
            model = internvl_jax.load(path, weights=weights)
            features[kind] = model.encode_image(pixels)
            states[kind] = model.image_states(pixels)[-1]
            logits[kind] = model.similarity(features[kind], model.encode_text(ids))
            del model
        command = [sys.executable, __file__, "--load", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory = json.loads(done.stdout.splitlines()[-1])
    return {
        "width": vit.width,
        "blocks": vit.depth,
        "cosine_tokens_min": float(cosine(states).min()),
        "cosine_features_min": float(cosine(features).min()),
        "cosine_logits_min": float(cosine(logits).min()),
        **memory,
    }


def cosine(pair: dict[str, np.ndarray]) -> np.ndarray:
    a, b = pair["float32"], pair["int8"]
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def loaded(path: str) -> dict[str, float]:
    """In a process of its own: bytes of the int8 arrays, and how far loading raised its memory."""
    jax.device_put(0).block_until_ready()
    before = peak_memory()
    model = internvl_jax.load(path, weights="int8")
    held = sum(x.nbytes for x in jax.tree.leaves(model.params))
    return {"int8_mib": held / 2**20, "loading_mib": (peak_memory() - before) / 2**10}


def peak_memory() -> int:
    """KiB at the most, of this program alone; `getrusage` would count its parent too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def table(found: dict) -> str:
    lines = [f"{'':36}{'float32':>9}{'int8':>9}"]
    for name, pair in found["figures"].items():
        lines.append(f"{name:36}{pair['float32']:9.4f}{pair['int8']:9.4f}")
    wide = found["wide"]
    lines.append(f"{wide['blocks']} blocks of width {wide['width']}, smallest cosine of")
    for what in ("tokens", "features", "logits"):
        lines.append(f"  {what:34}{wide[f'cosine_{what}_min']:9.6f}")
    lines.append(
        f"loading {wide['int8_mib']:.0f} MiB of int8 arrays took {wide['loading_mib']:.0f} MiB"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
