"""Writes any source as ArrayRecord files: one range read per record, for buckets and large runs."""

import collections
import json
import os
import pathlib
from collections.abc import Callable

from internvl_jax.data import sources
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import example_proto

# One record a group and no compression: images are compressed already, and any is read alone.
OPTIONS = "group_size:1,uncompressed"


def write(
    spec: str,
    target: str | os.PathLike,
    *,
    shard_records: int = 10_000,
    tell: Callable[[str], None] = lambda line: None,
) -> dict:
    """Writes TARGET-00000-of-00012.array_record …: {"files", "records", "skipped": {cause: n}}.

    A file appears when it is complete, and is kept when the same call is repeated, so that an
    interrupted one goes on where it was. What the files were made of stands in TARGET.json; files
    of other data are refused.
    """
    source = sources.open_source(sources.spec_of(spec), image_size=48)
    if len(source) == 0:
        raise ValueError(f"the data source has no records: {source.identity}")
    target = pathlib.Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shards = -(-len(source) // shard_records)
    made_of = {"source": source.identity, "shard_records": shard_records}
    note = target.with_name(f"{target.name}.json")
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before["made_of"] != made_of:
            raise ValueError(
                f"{target} holds other data, of {before['made_of']['source']}; choose another name"
            )
    else:
        note.write_text(json.dumps({"made_of": made_of}), encoding="utf-8")
    skipped, records = collections.Counter(), 0
    for shard in range(shards):
        path = target.with_name(f"{target.name}-{shard:05d}-of-{shards:05d}.array_record")
        done = path.with_suffix(".done.json")
        if not (path.exists() and done.exists()):
            indices = range(shard * shard_records, min((shard + 1) * shard_records, len(source)))
            counts = _write_shard(source, indices, path, tell)
            done.write_text(json.dumps(counts), encoding="utf-8")
        counts = json.loads(done.read_text(encoding="utf-8"))
        records += counts.pop("records")
        skipped.update(counts)
    return {"files": shards, "records": records, "skipped": dict(skipped)}


def _write_shard(source, indices, path, tell):
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = f"{path}.tmp"
    writer = ArrayRecordWriter(temporary, OPTIONS)
    counts = collections.Counter(records=0)
    try:
        for index, handle in zip(indices, source.fetch(indices), strict=True):
            try:
                if isinstance(handle, RecordError):
                    raise handle
                writer.write(_example(source, handle))
                counts["records"] += 1
            except RecordError as error:
                counts[error.cause] += 1
                tell(f"skipped {error.at(source.place(index))} ({error.cause})")
    finally:
        writer.close()
    os.replace(temporary, path)
    return counts


def _example(source, handle):
    texts, found = source.texts_in(handle), source.image_in(handle)
    record = {"image_id": texts["image_id"]}
    if texts.get("captions"):
        record["caption"] = texts["captions"]
    if texts.get("rounds"):
        record["conversations"] = [
            {"from": who, "value": text}
            for turn in texts["rounds"]
            for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
    if not isinstance(found, bytes):
        raise RecordError("missing_image", "only records with one encoded image are written")
    return example_proto.encode({"image": found, "json": json.dumps(record, ensure_ascii=False)})
