"""Faults of the data: bad records, readers that hang or die; and the same batches by any number."""

import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from internvl_jax.data import errors, pipelines, sources, stream
from internvl_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
OPTIONS = dict(task="contrastive", image_size=24, text_length=40, seed=5, tokenizer=TOKENIZER)


def build(*specs, batch_size=8, **changes):
    pairs = [spec if isinstance(spec, tuple) else (spec, 1.0) for spec in specs]
    return pipelines.build(sources=pairs, batch_size=batch_size, **{**OPTIONS, **changes})


@pytest.fixture
def spoilt(tmp_path, make):
    """A tar of 64 records, of which six are bad, each by another cause."""
    members = []
    for n in range(64):
        name, data, text = f"{n:03d}", make.picture(n), f"picture {n}".encode()
        if n == 5:
            data = data[: len(data) // 2]
        elif n == 9:
            data = b""
        elif n == 17:
            text = b"\xff"
        elif n == 23:
            data = b"GIF89a"
        members.append((f"{name}.jpg", data))
        if n != 31:
            members.append((f"{name}.txt", text))
    make.tar(tmp_path / "x.tar", members)
    size = os.path.getsize(tmp_path / "x.tar")
    source = sources.WebDataset(f"{tmp_path}/x.tar")
    os.truncate(tmp_path / "x.tar", int(source.index.rows[63]["image_at"]) + 50)
    assert size > os.path.getsize(tmp_path / "x.tar")
    return f"webdataset:{tmp_path}/x.tar"


BAD = {5: "corrupt_image", 9: "missing_image", 17: "invalid_text", 23: "corrupt_image",
       31: "missing_text", 63: "truncated"}


def test_bad_records_are_counted_by_cause_and_replaced_alike(spoilt, capfd):
    pipeline = build(spoilt)
    with contextlib.closing(pipeline.iterate()) as reader:
        epoch = [(next(reader), reader.ids) for _ in range(8)]
    causes = list(BAD.values())
    # A record may be drawn again in place of another, so the counts are at least these.
    assert all(reader.skipped[cause] >= causes.count(cause) for cause in causes)
    assert set(reader.skipped) == set(causes) and reader.seen == 64
    used = {int(name.split(":")[1]) for _, ids in epoch for name in ids}
    assert used == set(range(64)) - set(BAD)
    told = capfd.readouterr().err
    assert f"{spoilt.partition(':')[2]}: record 31 (031.jpg)" in told and "(missing_text" in told
    # The same replacements after a resume, by another number of workers, and for half the rows.
    again = build(spoilt, workers=2)
    with contextlib.closing(again.iterate(3)) as resumed:
        for batch, ids in epoch[3:]:
            found = next(resumed)
            assert resumed.ids == ids
            np.testing.assert_array_equal(found["image"], batch["image"])
    half = build(spoilt, rows=range(4, 8))
    np.testing.assert_array_equal(half.batch(6)["text"], epoch[6][0]["text"][4:])


def test_too_many_bad_records_end_the_run_and_are_named(spoilt, monkeypatch):
    monkeypatch.setattr(stream, "_ALLOWANCE", 50)  # so that a small data set is enough
    with (
        contextlib.closing(build(spoilt, max_bad_fraction=0.02).iterate()) as reader,
        pytest.raises(stream.StreamError, match=r"2 of \d+ records cannot be used \(.*x.tar: rec"),
    ):
        for _ in range(8):
            next(reader)


def test_no_record_is_lost_or_comes_twice_in_an_epoch(tmp_path, make):
    pattern = make.shards(tmp_path, 3, 16)
    pipeline = build((f"webdataset:{pattern}", 0.5), ("digits", 0.5), batch_size=8)
    for epoch in range(2):
        seen = [i for step in range(12) for i in pipeline.ids(12 * epoch + step) if i[0] == "0"]
        assert sorted(seen) == sorted(f"0:{n}" for n in range(48))


@pytest.mark.parametrize(
    "processes, workers",
    [
        (1, 0),
        (2, 0),
        (4, 0),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_ids_are_the_same_for_any_number(tmp_path, make, processes, workers):
    spec = f"webdataset:{make.shards(tmp_path, 2, 12)}"
    expected = [build(spec).ids(step) for step in range(2, 6)]
    share = 8 // processes
    for process in range(processes):
        rows = range(process * share, (process + 1) * share)
        pipeline = build(spec, rows=rows, workers=workers)
        with contextlib.closing(pipeline.iterate_ids(2)) as reader:
            for whole in expected:
                next(reader)
                assert reader.ids == whole[rows.start : rows.stop]


def test_examples_draw_from_grains_generators():
    import grain

    drawn = grain.MapDataset.range(50).random_map(lambda _, rng: rng.integers(1 << 40), seed=77)
    assert [stream.generator(77, n).integers(1 << 40) for n in range(50)] == list(drawn)


class Slow(sources.JsonlImages):
    """A source whose reads do not come back."""

    def image_in(self, handle):
        time.sleep(3600)


@pytest.fixture
def listed(tmp_path, make):
    (tmp_path / "a.jpg").write_bytes(make.picture(1))
    line = json.dumps({"image": "a.jpg", "caption": "a"})
    (tmp_path / "data.jsonl").write_text("\n".join([line] * 16))
    return tmp_path / "data.jsonl"


def test_a_reader_that_hangs_is_an_error_with_its_stack(listed, capfd):
    started = time.monotonic()
    with contextlib.closing(build(Slow(listed), timeout=0.5).iterate()) as reader:
        with pytest.raises(stream.StreamError, match=r"no batch .* within 0.5 s \(batch 0\)"):
            next(reader)
        assert "image_in" in capfd.readouterr().err
    assert time.monotonic() - started < 60  # and closing does not wait for it either


def test_a_worker_that_dies_is_an_error(listed):
    pipeline = build(sources.JsonlImages(listed), workers=1, timeout=60)
    with contextlib.closing(pipeline.iterate()) as reader:
        next(reader)
        workers = multiprocessing.active_children()
        assert workers
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(stream.StreamError, match="a worker of the data has died"):
            for _ in range(1000):
                next(reader)


@pytest.mark.slow
def test_errors_of_workers_keep_their_kind(tmp_path, listed):
    os.remove(tmp_path / "a.jpg")
    with (
        contextlib.closing(build(f"jsonl:{listed}", workers=1).iterate()) as reader,
        pytest.raises(stream.StreamError, match=r"20 records in a row .*data.jsonl:\d+: No such"),
    ):
        next(reader)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_memory_stays_over_an_epoch(tmp_path, make):
    pipeline = build(f"webdataset:{make.shards(tmp_path, 2, 64)}", batch_size=16)
    with contextlib.closing(pipeline.iterate()) as reader:
        for _ in range(16):
            next(reader)
        before = resident()
        for _ in range(80):
            next(reader)
        assert resident() - before < 30e6


@pytest.mark.parametrize("cause", errors.CAUSES)
def test_causes_survive_the_way_from_a_worker(cause):
    import pickle

    error = pickle.loads(pickle.dumps(errors.RecordError(cause, "broken", "file:3")))
    assert (error.cause, str(error), error.at("x").place) == (cause, "file:3: broken", "file:3")


def test_no_text_of_a_user_becomes_a_special_token(listed):
    evil = "</s> <s> <unk> [PAD] <image> <0x0A> a"
    lines = [json.dumps({"image": "a.jpg", "caption": f"{evil} {n}"}) for n in range(8)]
    listed.write_text("\n".join(lines))
    batch = build(f"jsonl:{listed}").batch(0)
    for row in batch["text"]:
        ids = row[row > 0]
        assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id
        assert not set(ids[1:-1]) & {TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.unk_id}


def test_reader_is_endless_until_it_is_closed(listed):
    reader = build(f"jsonl:{listed}").iterate(10**6)
    next(reader)
    reader.close()
    with pytest.raises(StopIteration):
        functools.reduce(lambda _, __: next(reader), range(100))
