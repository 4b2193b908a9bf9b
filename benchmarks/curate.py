"""filter and dedup over a million rows of scores on Beam's local runner: time and peak memory.

    .venv-curate/bin/python benchmarks/curate.py --json benchmarks/results/curate.json

Runs in the environment that `make test-all` builds for Beam, with the repository on PYTHONPATH.
Every hundredth row is a near-duplicate of an earlier one. The list of filter is compared with a
plain loop over the same rows, that of dedup with what was planted.

With --photos=FOLDER (scikit-image's skimage/data, say) also which copies of pictures are found:
squares that do not overlap, of every second of these photos, and rendered scenes; re-encoded,
resized, and with 5 % cut off. The settings were chosen by the other half of scikit-image's photos,
scikit-learn's two and scenes of the split "train".
A copy counts as found where it and its own original are taken for near-duplicates.
--shards=0 measures nothing else.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import itertools
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
from PIL import Image
from pyarrow import parquet

from internvl_jax.data.curate import hashing, rules

SHARD = 10_000
COLUMNS = ("width", "height", "caption", "similarity", "watermark", "thumbnail")
WORDS = ("a", "red", "dog", "runs", "on", "the", "beach", "with", "an", "old", "man", "click here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100, help="of 10,000; default: %(default)s")
    parser.add_argument("--photos", metavar="FOLDER", help="images whose copies are to be found")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = {"date": datetime.date.today().isoformat(), "cores": os.cpu_count()}
        if args.shards:
            figures |= measure(pathlib.Path(folder), args.shards)
        if args.photos:
            figures["copies"] = copies(pathlib.Path(args.photos))
    print(json.dumps(figures, indent=2))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(folder: pathlib.Path, shards: int) -> dict[str, Any]:
    scores = folder / "scores"
    scores.mkdir()
    planted, expected = write(scores, shards)
    figures: dict[str, Any] = {
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
        thumbnails = random_thumbnails(rng)
        first = thumbnails.copy() if first is None else first
        if shard:
            for row in range(0, SHARD, 100):
                noise = rng.integers(-4, 5, hashing.SIDE**2)
                thumbnails[row] = np.clip(first[rng.integers(SHARD)] + noise, 0, 255)
                planted.append(shard * SHARD + row)
        captions = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 14, SHARD)]
        table = {
            "row": np.arange(SHARD), "error": [None] * SHARD, "caption": captions,
            "width": rng.integers(30, 900, SHARD), "height": [300] * SHARD,
            "similarity": rng.uniform(0.1, 0.5, SHARD), "watermark": rng.random(SHARD),
            "thumbnail": [thumbnail.tobytes() for thumbnail in thumbnails],
        }
        parquet.write_table(pa.table(table), folder / f"{shard:06d}-x.parquet")
        signals = {name: table[name] for name in COLUMNS[:-1]}
        for number in range(SHARD):
            row = {name: values[number] for name, values in signals.items()}
            if rules.fault(row, ("stage1", "stage2"), rules.Stage1()) is None:
                expected.append(shard * SHARD + number)
    return np.array(planted), np.array(expected)


def random_thumbnails(rng: np.random.Generator) -> np.ndarray:
    """Of soft spots, uint8 [SHARD, pixels]: 6 x 6 random values drawn out to the full size."""
    places = np.linspace(0, 5, hashing.SIDE)
    share = np.clip(1 - np.abs(places[:, None] - np.arange(6)), 0, None)  # [pixels, values]
    spots = rng.normal(128, 50, (SHARD, 6, 6))
    large = np.clip(share @ spots @ share.T, 0, 255)
    return large.reshape(SHARD, -1).astype(np.uint8)


# --- copies of pictures -------------------------------------------------------------------------


def encoded(picture: Image.Image, quality: int, scale: float = 1.0) -> Image.Image:
    file = io.BytesIO()
    size = [max(1, round(side * scale)) for side in picture.size]
    picture.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return Image.open(file)


def without(picture: Image.Image, left: float, top: float, right: float, bottom: float):
    w, h = picture.size
    box = left * w, top * h, (1 - right) * w, (1 - bottom) * h
    return encoded(picture.crop(tuple(round(x) for x in box)), 85)


COPIES = {
    "quality 30": lambda p: encoded(p, 30),
    "0.4 of the side": lambda p: encoded(p, 80, 0.4),
    "1.7 of the side": lambda p: encoded(p, 80, 1.7),
    "5 % cut off all round": lambda p: without(p, 0.05, 0.05, 0.05, 0.05),
    "5 % cut off at a corner": lambda p: without(p, 0.0, 0.05, 0.05, 0.0),
    "5 % cut off below": lambda p: without(p, 0.0, 0.0, 0.0, 0.05),
}


def copies(photos: pathlib.Path) -> dict[str, Any]:
    """Shares of the copies that are found, and of the pairs of different pictures taken for one."""
    from internvl_jax.data import scenes

    wholes = []
    for path in sorted(photos.iterdir()):
        with contextlib.suppress(OSError):
            whole = Image.open(path).convert("RGB")
            if min(whole.size) >= 160:
                wholes.append(whole)
    squares = [
        whole.crop((left, top, left + 160, top + 160))
        for whole in wholes[1::2]
        for top in range(0, whole.height - 159, 160)
        for left in range(0, whole.width - 159, 160)
    ]
    rng = np.random.default_rng(11)
    chosen = rng.permutation(len(squares))[:150]
    rendered = scenes.render([scenes.scene("test", n, seed=11) for n in range(100)], 160)
    kinds = {
        "photos": [squares[n] for n in chosen],
        "rendered scenes": [Image.fromarray(pixels) for pixels in rendered],
    }
    return {name: copies_of(pictures) for name, pictures in kinds.items()}


def copies_of(pictures: list[Image.Image]) -> dict[str, Any]:
    first = np.stack([hashing.thumbnail(picture) for picture in pictures])
    plain = hashing.image_keys(first)[3][:, 0] == 0
    count = len(pictures)
    found = {}
    for name, change in COPIES.items():
        second = np.stack([hashing.thumbnail(change(picture)) for picture in pictures])
        found[name] = sum(len(near(first[n], second[n : n + 1])) for n in range(count)) / count
    pairs = sum(len(near(first[n], first[n + 1 :])) for n in range(count - 1))
    return {
        "pictures": count,
        "too plain to be told apart, not found": int(plain.sum()),
        "found": found,
        "found, mean": float(np.mean(list(found.values()))),
        "false pairs, share": pairs / (count * (count - 1) / 2),
    }


def near(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which other thumbnails [N, pixels] are near one: under one key, and of like views."""
    keys, part, _, spread = hashing.image_keys(np.concatenate([one[None], others]))
    found = np.zeros(len(others), bool)
    for a, b in itertools.product(range(len(hashing.PARTS)), repeat=2):
        if a and b:
            continue
        meet = np.isin(keys[1:, part == b], keys[0, part == a]).any(axis=1)
        meet = np.flatnonzero(meet & (spread[1:, 0] > 0) & (spread[0, 0] > 0))
        if len(meet):
            whole = hashing.views(one[None], np.array([a]))
            views = hashing.views(others[meet], np.full(len(meet), b))
            found[meet] |= hashing.copies(whole, views)[0]
    return np.flatnonzero(found)


if __name__ == "__main__":
    main()
