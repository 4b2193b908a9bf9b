"""Scores of every record of a source: one parquet file per shard, written once and whole.

Columns: row (number in the shard), error (cause, for a record that cannot be used), width, height,
caption, similarity, watermark, unsafe, aesthetic, thumbnail (`hashing.thumbnail`). A similarity
that no encoder gave comes from the record's metadata, as do the other signals.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from internvl_jax.data import image, sources
from internvl_jax.data.curate import hashing
from internvl_jax.data.curate.rules import SIGNALS
from internvl_jax.data.errors import RecordError

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("error", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        *((name, pa.float32()) for name in SIGNALS),
        ("thumbnail", pa.binary()),
    ]
)
# (images, captions) of a part of a shard → cosine of each pair
Encoder = Callable[[Sequence[Any], Sequence[str]], np.ndarray]
_SHARD = 10_000  # records a file, for sources that are not cut into shards
_TOGETHER = 64


def shards_of(source: sources.Source) -> list[tuple[str, int, int]]:
    """(name, first record, record after the last) of each shard of a source."""
    index = getattr(source, "index", None)
    if index is not None and len(index.paths) > 1:
        bounds = index.starts.tolist()
        names = [os.path.basename(path) for path in index.paths]
    else:
        bounds = [*range(0, len(source), _SHARD), len(source)]
        names = [f"records-{start}" for start in bounds[:-1]]
    parts = zip(names, bounds, bounds[1:], strict=False)
    return [(f"{n:06d}-{name}", a, b) for n, (name, a, b) in enumerate(parts)]


def score(
    spec: str,
    folder: str | os.PathLike,
    encoder: Encoder | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Writes the score files that are missing: {"shards", "written", "records", "errors"}.

    encoder: gives the similarity; None leaves it to the metadata. part: (k, n) takes every n-th
    shard from the k-th on, for n machines at the same folder.
    """
    source = sources.open_source(sources.spec_of(spec), image_size=48)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"source": source.identity, "encoder": getattr(encoder, "identity", "")}
    _claim(folder / "about.json", about)
    shards = shards_of(source)[part[0] :: part[1]]
    counts = {"shards": len(shards), "written": 0, "records": 0, "errors": 0}
    for name, start, end in shards:
        path = folder / f"{name}.parquet"
        if path.exists():
            continue
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with parquet.ParquetWriter(temporary, SCHEMA) as writer:
            for first in range(start, end, _TOGETHER):
                rows = _rows(source, range(first, min(first + _TOGETHER, end)), start, encoder)
                writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
                counts["records"] += len(rows)
                counts["errors"] += sum(row["error"] is not None for row in rows)
        os.replace(temporary, path)
        counts["written"] += 1
        tell(f"{path}: {end - start} records")
    return counts


def _claim(note: pathlib.Path, about: Mapping[str, str]) -> None:
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        for name, value in about.items():
            if before[name] != value:
                raise ValueError(
                    f"{note.parent} holds scores of another {name}: {before[name]!r}, not "
                    f"{value!r}; choose another folder"
                )
    else:
        note.write_text(json.dumps(about), encoding="utf-8")


def _rows(source, indices, start, encoder):
    rows, pictures = [], []
    for index, handle in zip(indices, source.fetch(indices), strict=True):
        row: dict[str, Any] = {"row": index - start, "error": None}
        try:
            if isinstance(handle, RecordError):
                raise handle
            captions = source.texts_in(handle).get("captions", {})
            row["caption"] = next((c[0] for c in captions.values() if c), "")
            found = source.image_in(handle)
            if found is None or isinstance(found, tuple):
                raise RecordError("missing_image", "only records with one image are scored")
            picture = image.decoded(found)
            row["width"], row["height"] = picture.size
            row["thumbnail"] = hashing.thumbnail(picture).tobytes()
            row |= _signals(source.metadata_in(handle))
            pictures.append((row, picture))
        except RecordError as error:
            row["error"] = error.cause
        rows.append(row)
    if encoder is not None and pictures:
        values = encoder([p for _, p in pictures], [row["caption"] for row, _ in pictures])
        for (row, _), value in zip(pictures, values, strict=True):
            row["similarity"] = float(value)
    return rows


def _signals(metadata):
    found = {}
    for name, keys in SIGNALS.items():
        value = next((metadata[key] for key in keys if key in metadata), None)
        if isinstance(value, int | float):
            found[name] = float(value)
    return found
