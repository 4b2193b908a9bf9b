"""What the benchmarks against PyTorch share: taking turns, and the work of a vision tower."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from internvl_jax.models.config import ViTConfig


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns; the first of each warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def forward_flops(tower: ViTConfig, batch: int) -> float:
    """FLOPs of the products of one forward pass: weights, and attention's two."""
    patches, width, depth = tower.grid**2, tower.width, tower.depth
    weights = depth * (4 * width**2 + 2 * width * tower.mlp_dim)
    patch_weights = tower.patch_size**2 * 3 * width
    tokens = 1 + patches
    return batch * (
        2 * tokens * weights + 2 * patches * patch_weights + 4 * depth * width * tokens**2
    )
