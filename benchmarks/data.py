"""Reading speed and memory of the data, each beside an alternative, taking turns in one run.

    python benchmarks/data.py --json benchmarks/results/data.json

tar          random reads (image and caption) of WebDataset tars, beside the `webdataset` package
             going through the same tars in order
arrayrecord  batched random reads, beside the library's own of the same records; also with the
             image taken out of each record's tf.train.Example, which the raw reads leave in it
pipeline     to a ready uint8 batch at 224 pixels with random crops, beside a PyTorch DataLoader
             with Pillow on the same tars' images as files; both in one thread
index        an index of 100 M records: time to open, memory after 10,000 random reads
memory       growth of the resident memory over an epoch

The need of a host is taken from `internvl-jax plan … --json` by --need (images per second).
Needs the extras [data] and [torch], and the package webdataset.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.data import image, sources

PACKAGES = ("array_record", "grain", "numpy", "opencv-python-headless", "pillow", "simplejpeg",
            "torch", "webdataset")
SHARDS, BATCH = 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each; default: %(default)s")
    parser.add_argument("--need", type=float, help="images per second that a host needs")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--index_child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index_child:
        print(json.dumps(open_index(args.index_child)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        figures = measure(pathlib.Path(folder), args.records, args.rounds)
    figures["cores"] = os.cpu_count()
    if args.need:
        rate = figures["pipeline 600 px"]["images_per_second_and_core"] * os.cpu_count()
        figures["over_the_need"] = {"need": args.need, "this_machine": rate / args.need}
    print(json.dumps(figures, indent=2))
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def measure(folder: pathlib.Path, records: int, rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "records": records,
    }
    large = write_tars(folder / "large", records, (600, 450))
    small = write_tars(folder / "small", records, (256, 256))
    figures["tar"] = tars(large, rounds)
    figures["arrayrecord"] = array_records(large, folder, rounds)
    figures["pipeline 600 px"] = pipeline_of(large, folder / "large", rounds)
    figures["pipeline 256 px"] = pipeline_of(small, folder / "small", rounds)
    figures["memory"] = memory(large, records)
    figures["index"] = large_index(folder)
    return figures


# --- data ---------------------------------------------------------------------------------------


def photo(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG with the detail of a photograph: about 60 KB at 600 x 450 pixels, quality 90."""
    rng = np.random.default_rng(number)
    total = np.zeros((size[1], size[0], 3), np.float32)
    for cells, weight in ((4, 1.0), (20, 0.5), (90, 0.25), (300, 0.12)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += weight * np.asarray(noise.resize(size, Image.Resampling.BICUBIC), np.float32)
    file = io.BytesIO()
    Image.fromarray((total / 1.87).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tars(folder: pathlib.Path, records: int, size: tuple[int, int]) -> str:
    """Tars as img2dataset writes them, and the same images as files beside; their pattern."""
    (folder / "images").mkdir(parents=True)
    different = [photo(n, size) for n in range(200)]
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for n in range(shard, records, SHARDS):
                data = different[n % len(different)]
                (folder / "images" / f"{n:06d}.jpg").write_bytes(data)
                for ending, content in (
                    ("jpg", data), ("txt", f"a photo, number {n}".encode()),
                    ("json", json.dumps({"caption": f"a photo, number {n}"}).encode()),
                ):
                    info = tarfile.TarInfo(f"{n:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar"


# --- comparisons --------------------------------------------------------------------------------


def alternate(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Records per second of each way: medians of `rounds` turns after one to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def tars(pattern: str, rounds: int) -> dict[str, float]:
    import webdataset

    source = sources.open_source(f"webdataset:{pattern}")
    order = np.random.default_rng(0).permutation(len(source))

    def ours() -> int:
        for index in order:
            source.image_in(int(index))
            source.texts_in(int(index))
        return len(order)

    def theirs() -> int:
        return sum(1 for _ in webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False))

    rates = alternate({"ours, random": ours, "webdataset, in order": theirs}, rounds)
    return {**rates, "ratio": rates["ours, random"] / rates["webdataset, in order"]}


def array_records(pattern: str, folder: pathlib.Path, rounds: int) -> dict[str, float]:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    from internvl_jax.data import export

    export.write(pattern, folder / "records" / "x", shard_records=1000)
    source = sources.open_source(f"arrayrecord:{folder}/records/x-*.array_record")
    raw = ArrayRecordDataSource(source.paths)
    batches = np.random.default_rng(0).permutation(len(source))[: len(source) // BATCH * BATCH]
    batches = batches.reshape(-1, BATCH).tolist()

    def ours() -> int:
        for batch in batches:
            source.fetch(batch)
        return len(batches) * BATCH

    def parsed() -> int:
        for batch in batches:
            for handle in source.fetch(batch):
                source.image_in(handle)
        return len(batches) * BATCH

    def theirs() -> int:
        for batch in batches:
            raw.__getitems__(batch)
        return len(batches) * BATCH

    rates = alternate({"ours": ours, "ours, image taken out": parsed, "raw": theirs}, rounds)
    return {
        **rates,
        "ratio": rates["ours"] / rates["raw"],
        "ratio with the image taken out": rates["ours, image taken out"] / rates["raw"],
    }


def pipeline_of(pattern: str, folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    files = sorted((folder / "images").iterdir())
    steps = 4

    class Files(torch.utils.data.Dataset):
        """The usual data set: a file, Pillow's random crop and bicubic resize, uint8."""

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            whole = Image.open(files[index]).convert("RGB")
            pixels = image.random_resized_crop(whole, 224, np.random.default_rng(index))
            return torch.from_numpy(pixels.copy())

    loader = iter(torch.utils.data.DataLoader(Files(), BATCH, shuffle=True))

    def theirs() -> int:
        nonlocal loader
        for _ in range(steps):
            try:
                batch = next(loader)
            except StopIteration:
                loader = iter(torch.utils.data.DataLoader(Files(), BATCH, shuffle=True))
                batch = next(loader)
            assert batch.shape == (BATCH, 224, 224, 3)
        return steps * BATCH

    def ours(decoder: str) -> Callable[[], int]:
        built = build(pattern, decoder)
        step = 0

        def run() -> int:
            nonlocal step
            for _ in range(steps):
                assert built.batch(step)["image"].shape == (BATCH, 224, 224, 3)
                step += 1
            return steps * BATCH

        return run

    ways = {"ours, fast": ours("fast"), "ours, exact": ours("exact"), "torch and Pillow": theirs}
    rates = alternate(ways, rounds)
    return {
        "images_per_second_and_core": rates["ours, fast"],
        **rates,
        "ratio": rates["ours, fast"] / rates["torch and Pillow"],
        "bytes per image": statistics.mean(f.stat().st_size for f in files[:200]),
    }


# --- memory -------------------------------------------------------------------------------------


def build(pattern: str, decoder: str) -> Any:
    """Stage 1's pipeline at 224 pixels."""
    from internvl_jax.data import pipelines
    from internvl_jax.data.tokenizer import Tokenizer

    return pipelines.build(
        task="contrastive", sources=((f"webdataset:{pattern}", 1.0),), batch_size=BATCH,
        image_size=224, text_length=80, seed=0, tokenizer=Tokenizer(), languages=("en",),
        augment="random_resized_crop", decoder=decoder,
    )


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(pattern: str, records: int) -> dict[str, float]:
    """Resident memory at the quarters of an epoch, in MB."""
    reader = build(pattern, "fast").iterate()
    found, steps = [], records // BATCH
    for step in range(steps):
        next(reader)
        if step % max(1, steps // 4) == max(1, steps // 4) - 1:
            found.append(resident() / 1e6)
    reader.close()
    return {"MB at the quarters": found, "growth from the first MB": found[-1] - found[0]}


def large_index(folder: pathlib.Path) -> dict[str, float]:
    """Lays down the kept index of 10,000 tars with 10,000 records each, and opens it afresh."""
    from internvl_jax.data import files
    from internvl_jax.data.sources import index, tar

    shards = folder / "many"
    shards.mkdir()
    count, each = 10_000, 10_000
    paths = [f"{shards}/{n:05d}.tar" for n in range(count)]
    for path in paths:
        pathlib.Path(path).touch()
    stamps = [files.stamp(path) for path in paths]
    place = index._merged_place(paths, stamps, tar.VERSION)
    header = {"descr": np.lib.format.dtype_to_descr(tar.ROW), "fortran_order": False,
              "shape": (count * each,)}
    with open(place.with_suffix(".npy"), "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * each * tar.ROW.itemsize)  # sparse: zeros
    about = {"counts": [each] * count, "digest": "0" * 64, "problems": []}
    place.with_suffix(".json").write_text(json.dumps(about))
    words = [sys.executable, __file__, f"--index_child={shards}/{{00000..{count - 1:05d}}}.tar"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def open_index(pattern: str) -> dict[str, float]:
    before = resident()
    start = time.perf_counter()
    source = sources.open_source(f"webdataset:{pattern}")
    seconds = time.perf_counter() - start
    for number in np.random.default_rng(0).integers(0, len(source), 10_000):
        source.index.rows[int(number)]
        source.index.file_of(int(number))
    return {
        "records": len(source),
        "seconds": seconds,
        "MB": resident() / 1e6,
        "MB of the index": (resident() - before) / 1e6,
    }


if __name__ == "__main__":
    main()
