"""Filtering and de-duplication as Apache Beam pipelines over score files.

An element is a shard (or a part of the keys), never a record, so a worker holds one shard at a
time. The default is Beam's local runner; any other is chosen by its flag. The files lie in a folder
that all workers see.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from pyarrow import parquet

from internvl_jax.data.curate import matching, rules

Flags = Sequence[str]


def score_files(folder: str | os.PathLike) -> tuple[list[str], list[int]]:
    """The score files of a folder in the order of their shards, and where their records start."""
    paths = sorted(str(path) for path in pathlib.Path(folder).glob("[0-9]*.parquet"))
    if not paths:
        raise ValueError(f"no score files in {folder}; make them with `internvl-jax data score`")
    numbers = [int(os.path.basename(path).partition("-")[0]) for path in paths]
    missing = sorted(set(range(numbers[-1] + 1)) - set(numbers))
    if missing:
        raise ValueError(
            f"{folder} lacks the score files of {len(missing)} shards, the first is number "
            f"{missing[0]}; run `internvl-jax data score` again, it writes what is missing"
        )
    counts = [parquet.read_metadata(path).num_rows for path in paths]
    return paths, np.concatenate([[0], np.cumsum(counts)]).tolist()


def filter_records(
    scores: str | os.PathLike,
    out: str | os.PathLike,
    wanted: Sequence[str] = ("stage1",),
    stage1: rules.Stage1 | None = None,
    flags: Flags = (),
) -> dict[str, Any]:
    """Writes the list of records that the rules keep: {"records", "kept", "removed": {cause: n}}.

    flags: Beam's, as --runner=FlinkRunner.
    """
    paths, starts = score_files(scores)
    stage1 = stage1 or rules.Stage1()
    with tempfile.TemporaryDirectory(dir=_folder_of(out)) as work:
        jobs = [(n, path, starts[n]) for n, path in enumerate(paths)]
        step = _Filter(work, tuple(wanted), stage1)
        _run(flags, lambda p, beam: p | beam.Create(jobs) | beam.Reshuffle() | beam.Map(step))
        removed: Counter[str] = Counter()
        for number in range(len(paths)):
            removed.update(json.loads(pathlib.Path(work, f"{number}.json").read_text()))
        kept = _join(out, (pathlib.Path(work, f"{n}.npy") for n in range(len(paths))))
    return {"records": starts[-1], "kept": kept, "removed": dict(removed)}


@dataclasses.dataclass(frozen=True)
class _Filter:
    """Applies the rules to one score file."""

    work: str
    wanted: tuple[str, ...]
    stage1: rules.Stage1

    def __call__(self, job: tuple[int, str, int]) -> int:
        number, path, start = job
        kept, removed = [], Counter()
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name != "thumbnail"]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    cause = rules.fault(row, self.wanted, self.stage1)
                    if cause:
                        removed[cause] += 1
                    else:
                        kept.append(start + row["row"])
        matching.save(pathlib.Path(self.work, f"{number}.npy"), np.array(kept, np.uint64))
        pathlib.Path(self.work, f"{number}.json").write_text(json.dumps(removed))
        return number


def deduplicate(
    scores: str | os.PathLike,
    out: str | os.PathLike,
    *,
    kinds: Sequence[str] = ("images",),
    exclude: str | os.PathLike | None = None,
    parts: int | None = None,
    flags: Flags = (),
) -> dict[str, Any]:
    """Writes the list of records that are no near-duplicates of earlier ones.

    kinds: what is compared, of `matching.KINDS`. exclude: a folder of score files of evaluation
    data, whose images are taken out of the training data. parts: pieces of the keys; by default so
    many that one is about as large as a shard. Returns {"records", "kept", "removed": {kind: n}}.
    """
    paths, starts = score_files(scores)
    before: list[str] = []
    if exclude is not None:
        before, more = score_files(exclude)
        starts = [*more, *(more[-1] + start for start in starts[1:])]
    excluded = starts[len(before)]
    everything = [*before, *paths]
    parts = parts or max(1, len(everything))
    removed: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(dir=_folder_of(out)) as folder:
        for kind in kinds:
            inside = pathlib.Path(folder, kind)
            inside.mkdir()
            # Captions of evaluation data may well be used: only their images are kept apart.
            work = matching.Work(str(inside), kind, parts, tuple(starts), excluded)
            jobs = list(enumerate(everything))
            _run(flags, lambda p, beam, work=work, jobs=jobs: _matched(p, beam, work, jobs))
            found = [np.load(work.removed(part)) for part in range(parts)]
            removed[kind] = np.unique(np.concatenate(found))
            shutil.rmtree(inside)
        gone = np.unique(np.concatenate([*removed.values(), np.zeros(0, np.uint64)]))
        gone = gone[gone >= excluded] - np.uint64(excluded)
        pieces = []
        for shard in range(len(paths)):
            first, end = (starts[len(before) + shard + k] - excluded for k in (0, 1))
            whole = np.arange(first, end, dtype=np.uint64)
            piece = pathlib.Path(folder, f"{shard}.npy")
            matching.save(piece, np.setdiff1d(whole, gone, assume_unique=True))
            pieces.append(piece)
        kept = _join(out, pieces)
    counts = {kind: len(found) for kind, found in removed.items()}
    return {"records": starts[-1] - excluded, "kept": kept, "removed": counts}


def _matched(pipeline: Any, beam: Any, work: matching.Work, jobs: list) -> Any:
    """Keys of every shard first, then the parts: a part waits for all shards."""
    return (
        pipeline
        | "shards" >> beam.Create(jobs)
        | "spread" >> beam.Reshuffle()
        | "keys" >> beam.Map(_Keys(work))
        | "all" >> beam.combiners.Count.Globally()
        | "parts" >> beam.FlatMap(lambda _, parts=work.parts: range(parts))
        | "spread parts" >> beam.Reshuffle()
        | "match" >> beam.Map(_Match(work))
    )


@dataclasses.dataclass(frozen=True)
class _Keys:
    work: matching.Work

    def __call__(self, job: tuple[int, str]) -> int:
        shard, path = job
        matching.write_keys(self.work, shard, matching.hashes_of(path, self.work.kind))
        return shard


@dataclasses.dataclass(frozen=True)
class _Match:
    work: matching.Work

    def __call__(self, part: int) -> int:
        matching.match(self.work, part)
        return part


def _run(flags: Flags, build: Callable[[Any, Any], Any]) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError(
            "filter and dedup need Apache Beam: pip install 'internvl-jax[curate]'"
        ) from error
    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        build(pipeline, beam)


def _folder_of(out: str | os.PathLike) -> pathlib.Path:
    folder = pathlib.Path(out).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _join(out: str | os.PathLike, pieces: Iterable[pathlib.Path]) -> int:
    """Writes the arrays of many files after one another as one, and returns its length."""
    out = pathlib.Path(out)
    pieces = list(pieces)
    total = sum(np.load(piece, mmap_mode="r").shape[0] for piece in pieces)
    temporary = out.with_name(f".{out.name}.tmp")
    with open(temporary, "wb") as file:
        header = {"descr": "<u8", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.load(piece).tobytes())
    os.replace(temporary, out)
    return total
