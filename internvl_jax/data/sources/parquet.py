"""Parquet files (img2dataset's, or Hugging Face's) as a random-access cache beside them.

A row of parquet cannot be read alone: its whole row group would be. So each file is turned once
into a TFRecord file of Examples, beside it or in the cache folder, and read from there.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from internvl_jax.data import files
from internvl_jax.data.sources import example_proto
from internvl_jax.data.sources.examples import TfRecords, frame

ENDING = ".rows1.tfrecord"


def open_parquet(pattern: str, language: str = "en", caption: str = "") -> TfRecords:
    """The rows of parquet files that hold their images."""
    return TfRecords("::".join(cached(p) for p in files.expand(pattern)), language, caption)


def cached(path: str) -> str:
    """Makes the random-access copy of one parquet file, unless there is a current one."""
    if not files.exists(path):
        raise ValueError(f"no data file at {path}")
    target = files.beside(path, ENDING)
    note = f"{target}.from"
    try:
        with open(note, encoding="utf-8") as file:
            if file.read() == files.stamp(path) and os.path.isfile(target):
                return target
    except FileNotFoundError:
        pass
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target) or ".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            for row in rows(path):
                file.write(frame(example_proto.encode(row)))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    with open(note, "w", encoding="utf-8") as file:
        file.write(files.stamp(path))
    return target


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as features of an Example, a few at a time.

    A struct of "bytes" and "path", which is how Hugging Face keeps images, becomes its bytes.
    """
    import pyarrow
    from pyarrow import parquet

    if files.is_remote(path):
        import fsspec

        opened = fsspec.open(path).open()
    else:
        opened = path
    try:
        with parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield {k: _feature(v) for k, v in row.items() if v is not None}
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _feature(value):
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, bytes | str | int | float):
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value
    return json.dumps(value, default=str)
