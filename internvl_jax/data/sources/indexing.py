"""Builds and keeps the index of a source ahead of its use, several files at a time."""

import concurrent.futures
import functools
import multiprocessing

from internvl_jax.data import files
from internvl_jax.data.sources import examples, index, parquet, tables, tar

# format → how a file is scanned, and the name of what that gives
_SCANS = {
    "webdataset": (tar.scan, tar.VERSION),
    "tfrecord": (examples.scan, examples.VERSION),
    "jsonl": (tables.scan_lines, tables.VERSION),
    "csv": (tables.scan_quoted, "csv 1"),
}


def build(spec: str, workers: int = 1) -> tuple[int, int]:
    """Number of files and of records. Raises ValueError for a format that needs no index."""
    kind, _, rest = spec.partition(":")
    pattern = rest.partition("?")[0] if "=" in rest else rest
    if kind == "parquet":
        paths = _each(parquet.cached, files.expand(pattern), workers)
        kind = "tfrecord"
    elif kind in _SCANS:
        paths = files.expand(pattern)
    else:
        raise ValueError(
            f"{spec} needs no index; these have one: parquet, {', '.join(sorted(_SCANS))}"
        )
    scan, version = _SCANS[kind]
    _each(functools.partial(index.scanned, scan=scan, version=version), paths, workers)
    found = index.opened(paths, scan, version, keep=True)
    return len(paths), len(found)


def _each(function, items, workers):
    if workers <= 1 or len(items) == 1:
        return [function(item) for item in items]
    # Threads of the parent do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(function, items))
