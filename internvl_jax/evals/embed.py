"""Features of a whole data source in shards on disk; an interrupted run goes on where it stopped.

    <output>/manifest.json                    what was computed, of which source
             image-00000.npy                  float32 or float16 [n, E], unit rows
             index-00000.json                 the image ids and captions of the shard's rows
             shard-00000.parquet              with format "parquet": all of it in columns

A shard is written under another name and renamed when it is whole, so what has its name is whole.
"""

import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.data import conversation
from internvl_jax.evals import features
from internvl_jax.models import InternVLConfig

FORMATS = ("npy", "parquet")


class EmbedError(ValueError):
    """A folder that holds features of something else, or a format that does not exist."""


def embed(
    config: InternVLConfig,
    params: features.Params,
    source: Any,
    output: Path,
    *,
    tokenizer: Any = None,
    mode: str = "c",
    language: str = "en",
    text_length: int = 80,
    file_format: str = "npy",
    dtype: str = "float32",
    shard_size: int = 10_000,
    batch_size: int = 64,
    identity: Mapping[str, Any] = types.MappingProxyType({}),
) -> int:
    """Write the features of every image of a source, and of its first caption if it has one.

    Args:
        source: as `data.sources` has them. tokenizer: None leaves the captions out.
        mode: "c" or "g". identity: what else the features depend on, as the checkpoint.

    Returns:
        The number of shards written by this call; those that were there are kept.

    Raises:
        EmbedError: `output` holds features of another source or model, or with other settings.
    """
    if file_format not in FORMATS:
        raise EmbedError(f"unknown format {file_format!r}; there are {', '.join(FORMATS)}")
    manifest = {
        "source": source.identity,
        "rows": len(source),
        "mode": mode,
        "language": language if tokenizer is not None else None,
        "format": file_format,
        "dtype": dtype,
        "shard_size": shard_size,
        "image_size": config.vit.image_size,
        **identity,
    }
    output.mkdir(parents=True, exist_ok=True)
    _claim(output / "manifest.json", manifest)
    written = 0
    for number in range(-(-len(source) // shard_size)):
        if _finished(output, number, file_format):
            continue
        rows = range(number * shard_size, min((number + 1) * shard_size, len(source)))
        texts = [source.texts(row) for row in rows]
        captions = [(t["captions"].get(language) or ("",))[0] for t in texts]
        pictures = _Rows(source, rows, config.vit.image_size)
        columns = {"image": features.image_features(config, params, pictures, mode, batch_size)}
        if tokenizer is not None and any(captions):
            ids = tokenizer.encode_batch(
                [conversation.contrastive_text(caption) for caption in captions], text_length
            )
            columns["text"] = features.text_features(config, params, ids, batch_size)
        columns = {name: values.astype(dtype) for name, values in columns.items()}
        index = {"image_id": [int(t["image_id"]) for t in texts], "caption": captions}
        _write(output, number, file_format, columns, index)
        written += 1
    return written


class _Rows:
    """Images of a source as slices of one size, uint8 [n, S, S, 3]; see `features.in_batches`."""

    def __init__(self, source: Any, rows: range, size: int):
        self.source, self.rows, self.size = source, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> np.ndarray:
        from PIL import Image

        from internvl_jax.data import image

        found = [self.source.image(row) for row in self.rows[part]]
        shape = (self.size, self.size)
        return np.stack(
            [x if x.shape[:2] == shape else image.square(Image.fromarray(x), self.size)
             for x in found]
        )  # fmt: skip


def _claim(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or see that the one there says the same."""
    if path.is_file():
        there = json.loads(path.read_text("utf-8"))
        other = [key for key in {**there, **manifest} if there.get(key) != manifest.get(key)]
        if other:
            key = other[0]
            raise EmbedError(
                f"{path.parent} holds features of {key} {there.get(key)!r}, not "
                f"{manifest.get(key)!r}; choose another folder"
            )
        return
    _whole(path, lambda name: name.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8"))


def _finished(output: Path, number: int, file_format: str) -> bool:
    # Of several files the index is written last.
    last = "shard-{:05d}.parquet" if file_format == "parquet" else "index-{:05d}.json"
    return (output / last.format(number)).is_file()


def _write(output, number, file_format, columns, index) -> None:
    if file_format == "parquet":
        _whole(output / f"shard-{number:05d}.parquet", lambda p: _parquet(p, columns, index))
        return
    for name, values in columns.items():
        _whole(output / f"{name}-{number:05d}.npy", lambda p, v=values: _save(p, v))
    text = json.dumps(index, ensure_ascii=False)
    _whole(output / f"index-{number:05d}.json", lambda p: p.write_text(text, "utf-8"))


def _save(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, values)


def _parquet(path: Path, columns, index) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "parquet needs pyarrow: pip install 'internvl_jax[data]', or --format=npy"
        ) from error
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in columns.items()
    }
    parquet.write_table(pa.table({**index, **arrays}), path)


def _whole(path: Path, write: Any) -> None:
    """Write a file under another name, then give it its own."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
