"""Looks over data before training: every record for what is wrong, a sample for what it is like."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from internvl_jax.data import image, sources
from internvl_jax.data.errors import RecordError
from internvl_jax.data.packing import PackedBatches

_TOGETHER = 64  # records fetched at once


@dataclasses.dataclass
class Verdict:
    """What `validate` found. errors: how many by cause; records = ok + the sum of errors."""

    records: int = 0
    ok: int = 0
    errors: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def to_json(self) -> dict:
        return {"records": self.records, "ok": self.ok, "errors": dict(self.errors)}


def validate(specs: Sequence[str], tell: Callable[[str], None] = lambda line: None) -> Verdict:
    """Reads and decodes every record. `tell` is called with a line for each that is bad.

    Beside the causes of `errors.CAUSES` there are those of whole files: "unreadable_file", and of
    tars "link", "unsafe_name", "duplicate_name", whose members are left out.
    """
    verdict = Verdict()

    def bad(cause, line):
        verdict.records += 1
        verdict.errors[cause] += 1
        tell(f"{line} ({cause})")

    for spec in specs:
        try:
            source = sources.open_source(sources.spec_of(spec), image_size=48)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            if str(error).startswith(("no data file", "no files", "the format", "unknown")):
                raise
            bad("unreadable_file", str(error))
            continue
        for path, cause, message in problems_of(source):
            bad(cause, f"{path}: {message}")
        for index, error in _checked(source):
            if error is None:
                verdict.records += 1
                verdict.ok += 1
            else:
                bad(error.cause, str(error.at(source.place(index))))
    return verdict


def problems_of(source: sources.Source) -> Sequence[tuple[str, str, str]]:
    """(path, cause, message) of what the index of a source had to leave out."""
    index = getattr(source, "index", None)
    return () if index is None else index.problems


def _checked(source) -> Iterator[tuple[int, RecordError | None]]:
    for start in range(0, len(source), _TOGETHER):
        indices = range(start, min(start + _TOGETHER, len(source)))
        for index, handle in zip(indices, source.fetch(indices), strict=True):
            yield index, _error_of(source, handle)


def _error_of(source, handle):
    try:
        if isinstance(handle, RecordError):
            raise handle
        texts = source.texts_in(handle)
        if not any(texts.get("captions", {}).values()) and not texts.get("rounds"):
            raise RecordError("missing_text", "no caption and no conversation")
        found = source.image_in(handle)
        for one in found if isinstance(found, tuple) else (found,):
            if isinstance(one, bytes):
                image.decode(one)
    except RecordError as error:
        return error
    return None


def statistics(spec: str, sample: int = 1000) -> dict:
    """What the records are like: {"records", "identity", "sampled", "bad", and quantiles of
    "width", "height", "bytes", "words"; counts of "formats" and "languages"}.

    sample: how many records are read, evenly over the source.
    """
    source = sources.open_source(sources.spec_of(spec), image_size=48)
    count = min(sample, len(source))
    values = collections.defaultdict(list)
    formats, languages, bad = collections.Counter(), collections.Counter(), collections.Counter()
    for index in np.linspace(0, len(source) - 1, count).astype(int):
        try:
            handle = source.handle(int(index))
            texts = source.texts_in(handle)
            found = source.image_in(handle)
            for one in found if isinstance(found, tuple) else (found,):
                if isinstance(one, bytes):
                    width, height, kind = image.header(one)
                    formats[kind] += 1
                    values["bytes"].append(len(one))
                elif one is not None:
                    height, width = one.shape[:2]
                else:
                    continue
                values["width"].append(width)
                values["height"].append(height)
        except RecordError as error:
            bad[error.cause] += 1
            continue
        for language, captions in texts.get("captions", {}).items():
            languages[language] += len(captions)
            values["words"] += [len(caption.split()) for caption in captions]
        turns = texts.get("rounds", ())
        if turns:
            values["rounds"].append(len(turns))
    return {
        "records": len(source),
        "identity": source.identity,
        "sampled": count,
        "bad": dict(bad),
        "formats": dict(formats),
        "languages": dict(languages),
        **{name: _quantiles(found) for name, found in sorted(values.items())},
    }


def packing(batches: PackedBatches, steps: int = 4) -> dict:
    """How well rows are filled: {"rows", "conversations", quantiles of "tokens" and "squares" of a
    conversation, shares "tokens_filled", "squares_filled" of the rows and "left_out" of the
    conversations}.

    steps: batches that are planned; no image is decoded.
    """
    rows = [row for step in range(steps) for row, _ in batches.planned(step)]
    drafts = [draft for row in rows for _, draft in row]
    tokens, squares = [len(d.ids) for d in drafts], [d.squares for d in drafts]
    length, room = batches.room
    return {
        "rows": len(rows),
        "conversations": len(drafts),
        "tokens": _quantiles(tokens),
        "squares": _quantiles(squares),
        "tokens_filled": sum(tokens) / (len(rows) * length),
        "squares_filled": sum(squares) / (len(rows) * room),
        "left_out": 1 - len(drafts) / (len(rows) * batches.conversations),
    }


def _quantiles(values):
    names = ("min", "p5", "median", "p95", "max")
    found = np.quantile(values, [0, 0.05, 0.5, 0.95, 1])
    return dict(zip(names, (float(v) for v in found), strict=True))


def build_index(specs: Sequence[str], workers: int = 1) -> dict:
    """Indexes files and keeps what is found: {"files", "records", "seconds"}.

    workers: processes that scan files at the same time.
    """
    from internvl_jax.data.sources import indexing

    started = time.monotonic()
    files, records = 0, 0
    for spec in specs:
        paths, count = indexing.build(sources.spec_of(spec), workers)
        files += paths
        records += count
    return {"files": files, "records": records, "seconds": time.monotonic() - started}
