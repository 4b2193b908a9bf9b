"""filter and dedup over a million rows of scores on Beam's local runner: time and peak memory.

    .venv-curate/bin/python benchmarks/curate.py --json benchmarks/results/curate.json

Runs in the environment that `make test-all` builds for Beam, with the repository on PYTHONPATH.
Every hundredth row is a near-duplicate of an earlier one. The list of filter is compared with a
plain loop over the same rows, that of dedup with what was planted.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from internvl_jax.data.curate import hashing, rules

SHARD = 10_000
COLUMNS = ("width", "height", "caption", "similarity", "watermark", "image_hashes")
WORDS = ("a", "red", "dog", "runs", "on", "the", "beach", "with", "an", "old", "man", "click here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100, help="of 10,000; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(pathlib.Path(folder), args.shards)
    print(json.dumps(figures, indent=2))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(folder: pathlib.Path, shards: int) -> dict[str, Any]:
    scores = folder / "scores"
    scores.mkdir()
    planted, expected = write(scores, shards)
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "apache-beam": importlib.metadata.version("apache-beam"),
        "records": shards * SHARD,
    }
    for what in ("nothing", "filter", "dedup"):
        out = folder / f"{what}.npy"
        words = [sys.executable, __file__, "--child", what, str(scores), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        figures[what] = json.loads(done.stdout.splitlines()[-1])
    kept = np.load(folder / "filter.npy")
    figures["filter"]["equal to the plain loop"] = bool(np.array_equal(kept, expected))
    gone = np.setdiff1d(np.arange(shards * SHARD), np.load(folder / "dedup.npy"))
    figures["dedup"] |= {
        "planted": len(planted),
        "found": float(np.isin(planted, gone).mean()),
        "others, share of the records": float((~np.isin(gone, planted)).mean() * len(gone)
                                              / (shards * SHARD)),
    }
    return figures


def child(what: str, scores: str, out: str) -> dict[str, float]:
    """One of the two in a process of its own, for its peak memory."""
    from internvl_jax.data.curate import pipelines

    start = time.perf_counter()
    if what == "filter":
        pipelines.filter_records(scores, out, ("stage1", "stage2"))
    elif what == "dedup":
        pipelines.deduplicate(scores, out)
    else:
        import apache_beam  # noqa: F401 - the memory of the libraries alone
    peak = max(resource.getrusage(who).ru_maxrss
               for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": time.perf_counter() - start, "peak MB": peak / 1e3}


def write(folder: pathlib.Path, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Score files; which records are planted near-duplicates; which the rules keep."""
    planted, expected = [], []
    first: np.ndarray | None = None
    for shard in range(shards):
        rng = np.random.default_rng(shard)
        hashes = rng.integers(1, 1 << 63, (SHARD, len(hashing.PARTS)), np.uint64)
        first = hashes.copy() if first is None else first
        if shard:
            for row in range(0, SHARD, 100):
                hashes[row] = first[rng.integers(SHARD)]
                for bit in rng.integers(0, 64, 2):
                    hashes[row, 0] ^= np.uint64(1) << np.uint64(bit)
                planted.append(shard * SHARD + row)
        captions = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 14, SHARD)]
        table = {
            "row": np.arange(SHARD), "error": [None] * SHARD, "caption": captions,
            "width": rng.integers(30, 900, SHARD), "height": [300] * SHARD,
            "similarity": rng.uniform(0.1, 0.5, SHARD), "watermark": rng.random(SHARD),
            "image_hashes": list(hashes),
        }
        parquet.write_table(pa.table(table), folder / f"{shard:06d}-x.parquet")
        signals = {name: table[name] for name in COLUMNS[:-1]}
        for number in range(SHARD):
            row = {name: values[number] for name, values in signals.items()}
            if rules.fault(row, ("stage1", "stage2"), rules.Stage1()) is None:
                expected.append(shard * SHARD + number)
    return np.array(planted), np.array(expected)


if __name__ == "__main__":
    main()
