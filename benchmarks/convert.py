"""Speed and memory of converting a full-size InternViT-6B, there and back, beside a plain copy.

    python benchmarks/convert.py --json benchmarks/results/convert.json

Writes a random InternViT-6B in the official layout (11.8 GB, bfloat16), copies its files, converts
them to a checkpoint of ours with the command `internvl-jax convert`, converts that back, and
compares every tensor byte for byte. Each step starts with its input outside the page cache and ends
with its output on the disk. Memory is what the converting process holds besides mapped files:
anonymous and shared, sampled from /proc. Needs 36 GB of disk and Linux.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from internvl_jax.convert import internvit
from internvl_jax.convert.layouts import parameter_shapes
from internvl_jax.convert.mapping import TorchTensors
from internvl_jax.convert.safetensors_files import Spec, Tensors, write
from internvl_jax.models.config import VITS, VisionConfig

SAMPLE_SECONDS = 0.02
PACKAGES = ("jax", "orbax-checkpoint", "tensorstore", "numpy")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48, help="of the tower; fewer for a trial")
    parser.add_argument("--directory", help="where to work; default: the temporary directory")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        figures = measure(Path(folder), args.layers)
    print(table(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(folder: Path, layers: int) -> dict:
    """All steps in `folder`; what a step no longer needs is deleted."""
    official, ours, back, copy = (folder / n for n in ("official", "ours", "back", "copy"))
    nbytes = write_official(official, layers)
    steps = {"copy": plain_copy(official, copy)}
    shutil.rmtree(copy)
    steps["to jax"] = converted(official, ours, "jax")
    steps["to official"] = converted(ours, back, "internvit")
    shutil.rmtree(ours)
    identical = same_tensors(official, back)
    for step in steps.values():
        step["gb_per_s"] = nbytes / 1e9 / step["seconds"]
        step["ratio_to_copy"] = step["seconds"] / steps["copy"]["seconds"]
    return {
        "model": f"InternViT-6B, {layers} layers, bfloat16",
        "bytes": nbytes,
        "byte_identical": identical,
        "steps": steps,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write_official(folder: Path, layers: int) -> int:
    """A random tower in the official layout; returns the bytes of its tensors."""
    config = VisionConfig(replace(VITS["6b"], depth=layers))
    fresh = TorchTensors(internvit.rules(config), parameter_shapes(config)).specs
    half = np.dtype(ml_dtypes.bfloat16)
    specs = {key: Spec(spec.shape, half) for key, spec in fresh.items()}

    def random(key: str) -> np.ndarray:
        # Random sign and mantissa, exponents of 2^-7 and 2^-6: the bits of usual weights.
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        bits = rng.integers(0, 1 << 16, specs[key].shape, np.uint16)
        return ((bits & 0x80FF) | 0x3C00).view(ml_dtypes.bfloat16)

    folder.mkdir()
    write(folder, specs, random)
    description = internvit.config_to_json(config) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(description))
    return sum(spec.nbytes for spec in specs.values())


def plain_copy(source: Path, target: Path) -> dict:
    """Copy the files of a folder, to the disk."""
    forget(source)
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    cached = time.perf_counter() - start
    settle(target)
    return {"seconds": time.perf_counter() - start, "seconds_before_sync": cached}


def converted(source: Path, target: Path, layout: str) -> dict:
    """Run the command, and watch its memory."""
    forget(source)
    command = [sys.executable, "-m", "internvl_jax.cli", "convert", str(source), str(target)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--layout={layout}"], env=environment, stdout=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, held_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    estimate = [line for line in process.stdout if line.startswith("memory")]
    if process.returncode:
        raise SystemExit(f"the conversion to {layout} failed")
    settle(target)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_gib": peak / 2**30, "estimate": estimate[0].split(None, 1)[1]}


def held_bytes(pid: int) -> int:
    """Anonymous and shared memory of a process; 0 when it has just ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
    return 0


def settle(folder: Path) -> None:
    """Wait until the files of a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    settle(folder)
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, byte for byte."""
    a, b = Tensors(first), Tensors(second)
    words = np.uint16
    return a.specs == b.specs and all(
        np.array_equal(a[key].view(words), b[key].view(words)) for key in a
    )


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def table(figures: dict) -> str:
    """The figures as text."""
    lines = [
        f"{figures['model']}: {figures['bytes'] / 1e9:.1f} GB on {figures['machine']}",
        f"{'':12} {'seconds':>8} {'GB/s':>6} {'× copy':>7} {'peak GiB':>9}",
    ]
    for name, step in figures["steps"].items():
        peak = f"{step['peak_gib']:9.2f}" if "peak_gib" in step else ""
        lines.append(
            f"{name:12} {step['seconds']:8.1f} {step['gb_per_s']:6.2f} "
            f"{step['ratio_to_copy']:7.2f} {peak}"
        )
    lines.append(f"byte-identical after the round trip: {figures['byte_identical']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
