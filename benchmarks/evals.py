"""Evaluation at scale: search in a gallery of a million, and zero-shot beside the forward alone.

    python benchmarks/evals.py gallery [--queries 10000 --rows 1000000]
    python benchmarks/evals.py zero_shot [--images 64 --rounds 5]
"""

import argparse
import json
import resource
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np


def _anonymous() -> int:
    """Bytes of memory that belong to this process and to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell anonymous memory")


def gallery(args: argparse.Namespace) -> dict:
    """Queries are noisy copies of gallery rows. The sample's ranks are also found one by one."""
    from internvl_jax.evals.gallery import Gallery, search

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "image-00000.npy"
        rows = np.lib.format.open_memmap(
            file, mode="w+", dtype=np.float32, shape=(args.rows, args.width)
        )
        for start in range(0, args.rows, 50_000):
            part = rng.standard_normal((min(50_000, args.rows - start), args.width), np.float32)
            rows[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
        rows.flush()
        right = rng.choice(args.rows, args.queries, replace=False)
        queries = rows[right] + 0.25 * rng.standard_normal((args.queries, args.width), np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        del rows
        peak, done = [0], threading.Event()

        def watch():
            while not done.wait(0.05):
                peak[0] = max(peak[0], _anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.monotonic()
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        hits, _, rank = search(queries, Gallery([file]), right)
        seconds = time.monotonic() - begin
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - cpu
        done.set()
        watcher.join()
        sample = rng.choice(args.queries, min(100, args.queries), replace=False)
        mapped = np.load(file, mmap_mode="r")
        scores = np.concatenate(
            [mapped[s : s + 50_000] @ queries[sample].T for s in range(0, args.rows, 50_000)]
        ).T
        own = scores[np.arange(len(sample)), right[sample]]
        brute = np.sum(scores >= own[:, None] * (1 - 1e-6), axis=1) - 1
        first = scores.argmax(axis=1)
        return {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "anonymous_gib": round(peak[0] / 2**30, 3),
            "recall_at_1": float(np.mean(rank == 0)),
            "ranks_equal_brute_force": bool(np.array_equal(rank[sample], brute)),
            "first_hits_equal_brute_force": bool(np.array_equal(hits[sample, 0], first)),
        }


def zero_shot(args: argparse.Namespace) -> dict:
    """Images per second of the zero-shot path from memory, and of the compiled forward alone."""
    import functools

    import jax

    from internvl_jax.evals import features
    from internvl_jax.models import bind, create
    from internvl_jax.models.config import INTERNVLS, VITS

    config = replace(
        INTERNVLS["tiny"], vit=replace(VITS["300m"], image_size=224, dtype="float32"),
        num_queries=0, pool_heads=16,
    )  # fmt: skip
    params = create(config, jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (args.images, 224, 224, 3), np.uint8)
    classes = features.unit(jax.random.normal(jax.random.key(1), (1000, config.embed_dim)))
    classes = np.asarray(classes)

    @functools.partial(jax.jit, static_argnames="config")
    def forward(params, pixels, *, config):
        return bind(config, params).encode_image(pixels)

    def alone():
        for start in range(0, len(images), args.batch):
            forward(params, images[start : start + args.batch], config=config).block_until_ready()

    def evaluated():
        found = features.image_features(config, params, images, "c", args.batch)
        np.argmax(found @ classes.T, axis=1)

    times = {alone: [], evaluated: []}
    alone(), evaluated()
    for turn in range(args.rounds):
        for one in (alone, evaluated) if turn % 2 else (evaluated, alone):
            begin = time.monotonic()
            one()
            times[one].append(time.monotonic() - begin)
    forward_s, path_s = (statistics.median(times[one]) for one in (alone, evaluated))
    ratios = [a / b for a, b in zip(times[alone], times[evaluated], strict=True)]
    return {
        "forward_images_per_second": round(len(images) / forward_s, 2),
        "zero_shot_images_per_second": round(len(images) / path_s, 2),
        "ratio_of_medians": round(forward_s / path_s, 3),
        "median_ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["gallery", "zero_shot"])
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folder", help="of the gallery's file, about 3 GB; default: temporary")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps({"gallery": gallery, "zero_shot": zero_shot}[args.what](args), indent=2))


if __name__ == "__main__":
    main()
