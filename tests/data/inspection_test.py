"""validate, statistics, export and the page of samples, on real files."""

import json
import os

import numpy as np
import pytest

from internvl_jax.data import export, gallery, inspection, pipelines, sources
from internvl_jax.data.tokenizer import Tokenizer


def test_validate_counts_every_record(tmp_path, make):
    whole = make.shards(tmp_path, 2, 4)
    make.tar(
        tmp_path / "bad.tar",
        [
            ("1.jpg", make.picture(1)), ("1.txt", b"fine"),
            ("2.jpg", make.picture(2)[:300]), ("2.txt", b"cut"),
            ("3.jpg", make.picture(3)),
            ("4.jpg", make.picture(4)), ("4.txt", b"\xff"),
            ("../5.jpg", make.picture(5)),
        ],
    )
    (tmp_path / "data.jsonl").write_text('{"image": "gone.jpg", "caption": "x"}\n{"image": 3}\n{\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    told = []
    paths = [whole, *(f"{tmp_path}/{n}" for n in ("bad.tar", "data.jsonl", "broken.parquet"))]
    verdict = inspection.validate(paths, told.append)
    assert verdict.to_json() == {
        "records": 17,
        "ok": 9,
        "errors": {
            "unsafe_name": 1, "corrupt_image": 1, "missing_text": 1, "invalid_text": 1,
            "missing_image": 1, "invalid_json": 2, "unreadable_file": 1,
        },
    }
    assert any(f"{tmp_path}/data.jsonl:3: not valid JSON" in line for line in told)
    assert any(line.startswith(f"{tmp_path}/bad.tar: record 1 (2.jpg)") for line in told)
    with pytest.raises(ValueError, match="no data file at"):
        inspection.validate([f"{tmp_path}/absent.jsonl"])
    with pytest.raises(ValueError, match=r"format of .* is not known by its ending; write FORMAT:"):
        inspection.validate([f"{tmp_path}/absent.xyz"])


def test_statistics(tmp_path, make):
    figures = inspection.statistics(make.shards(tmp_path, 2, 20), sample=10)
    assert (figures["records"], figures["sampled"], figures["bad"]) == (40, 10, {})
    assert figures["formats"] == {"jpeg": 10} and figures["languages"] == {"en": 10}
    assert figures["width"]["median"] == 40 and figures["height"]["max"] == 30
    assert figures["words"] == dict.fromkeys(("min", "p5", "median", "p95", "max"), 2.0)


def test_export_is_the_same_data_and_goes_on_where_it_was(tmp_path, make):
    pattern = make.shards(tmp_path, 2, 7)
    first = export.write(pattern, tmp_path / "out" / "x", shard_records=5)
    assert first == {"files": 3, "records": 14, "skipped": {}}
    before, after = (
        sources.open_source(spec)
        for spec in (f"webdataset:{pattern}", f"arrayrecord:{tmp_path}/out/x-*.array_record")
    )
    assert len(after) == 14
    for index in (0, 6, 13):
        np.testing.assert_array_equal(before.image(index), after.image(index))
        assert before.texts(index)["captions"] == after.texts(index)["captions"]
    # Interrupted in its last file: the others are kept, that one is written again.
    files = sorted((tmp_path / "out").glob("*.array_record"))
    times = [os.stat(file).st_mtime_ns for file in files]
    os.remove(files[-1])
    assert export.write(pattern, tmp_path / "out" / "x", shard_records=5) == first
    assert [os.stat(file).st_mtime_ns for file in files[:-1]] == times[:-1]
    with pytest.raises(ValueError, match="holds other data"):
        export.write(f"{tmp_path}/00000.tar", tmp_path / "out" / "x", shard_records=5)


def test_page_shows_crops_tokens_and_the_label_mask():
    tokenizer = Tokenizer()
    pipeline = pipelines.build(
        task="instruct", sources=(("scenes/test", 1.0),), batch_size=4, image_size=24,
        text_length=60, seed=0, tokenizer=tokenizer, template="brief", num_image_tokens=9,
        languages=("en",),
    )
    batch, _, ids = pipeline.batches[0]
    page = gallery.page(batch, ids, [pipeline.place(i) for i in ids], tokenizer, "a <title>")
    assert page.count("<img ") == 4 and page.count("image × 9") == 4
    assert "a &lt;title&gt;" in page and "scenes v1 test" in page
    learnt = int((batch["labels"] != -100).sum())
    assert page.count('class="token learnt" title') == learnt
    assert json.dumps(ids[0])[1:-1] in page
