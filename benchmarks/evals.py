"""Evaluation at scale: search in a gallery of a million, and zero-shot beside the forward alone.

    python benchmarks/evals.py gallery --json benchmarks/results/evals.json
    python benchmarks/evals.py zero_shot --json benchmarks/results/evals.json

gallery    10 k queries in 1 M × 768 float32 rows in a mapped file: time, anonymous memory, and
           whether a sample's ranks are those of plain sorting
zero_shot  images per second from an array to predicted classes, beside the compiled forward of
           the same tower (InternViT-300M, 224 pixels) alone, taking turns

--json keeps what the file has of the other.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
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
            "queries": args.queries,
            "rows": args.rows,
            "width": args.width,
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

    clocks = {"wall": time.monotonic, "cpu": time.process_time}
    times = {(clock, one): [] for clock in clocks for one in (alone, evaluated)}
    alone(), evaluated()
    for turn in range(args.rounds):
        for one in (alone, evaluated) if turn % 2 else (evaluated, alone):
            begin = {clock: read() for clock, read in clocks.items()}
            one()
            for clock, read in clocks.items():
                times[clock, one].append(read() - begin[clock])
    ratios = {
        clock: [a / b for a, b in zip(times[clock, alone], times[clock, evaluated], strict=True)]
        for clock in clocks
    }
    return {
        "images": args.images,
        "batch": args.batch,
        "rounds": args.rounds,
        "forward_images_per_second": len(images) / statistics.median(times["wall", alone]),
        "zero_shot_images_per_second": len(images) / statistics.median(times["wall", evaluated]),
        # Above 1: the path took less than the forward alone.
        "median_ratio": round(statistics.median(ratios["wall"]), 3),
        "ratio_of_sums": round(sum(times["wall", alone]) / sum(times["wall", evaluated]), 3),
        "cpu_time_ratio_of_sums": round(
            sum(times["cpu", alone]) / sum(times["cpu", evaluated]), 3
        ),
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
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args()
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy")},
        **{"gallery": gallery, "zero_shot": zero_shot}[args.what](args),
        # Other programs on the machine lengthen what is measured by the clock.
        "load_average": [round(x, 1) for x in os.getloadavg()],
    }
    print(json.dumps(found, indent=2))
    if args.json:
        file = Path(args.json)
        before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        file.write_text(json.dumps({**before, args.what: found}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
