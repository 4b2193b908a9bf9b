"""filter and dedup on Beam's local runner, from the command line, beside plain Python.

Beam has an environment of its own (`make test-all` builds it), since it caps packages below the
versions that the rest is tested with.
"""

import collections
import json
import os
import pathlib
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from internvl_jax.data import sources
from internvl_jax.data.curate import rules, scoring

ROOT = pathlib.Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-curate" / "bin" / "python"
pytestmark = pytest.mark.slow


def run(*words):
    done = subprocess.run(
        [PYTHON, "-m", "internvl_jax.cli", "data", *map(str, words), "--json"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def score_rows(definition, count, seed=0):
    """Rows as `data score` writes them, some of which each rule removes, some near-duplicates."""
    rng = np.random.default_rng(seed)
    words = ["a", "red", "dog", "runs", "on", "the", "beach", "with", "old", "man", "click here",
             "sky", "404 error", "tree", "house", "river"]
    rows = []
    for n in range(count):
        thumbnail = definition.smooth(rng)
        if n > 20 and rng.random() < 0.2:  # of the same as an earlier one
            earlier = rows[int(rng.integers(n))]["thumbnail"]
            if earlier:
                thumbnail = definition.altered(rng, np.frombuffer(earlier, np.uint8))
        row = {"row": n, "error": None, "width": int(rng.integers(20, 900)), "height": 300,
               "caption": " ".join(rng.choice(words, int(rng.integers(1, 14)))),
               "similarity": float(rng.uniform(0.1, 0.5)), "watermark": float(rng.random()),
               "unsafe": None, "aesthetic": 5.0, "thumbnail": thumbnail.tobytes()}
        if rng.random() < 0.02:
            row |= {"error": "corrupt_image", "width": None, "caption": None, "thumbnail": None}
        rows.append(row)
    return rows


def write_scores(folder, rows, shards):
    folder.mkdir()
    size = -(-len(rows) // shards)
    for shard in range(shards):
        part = [{**row, "row": n} for n, row in enumerate(rows[shard * size : (shard + 1) * size])]
        table = pa.Table.from_pylist(part, scoring.SCHEMA)
        parquet.write_table(table, folder / f"{shard:06d}-x.parquet")
    return folder


def test_filter_equals_plain_python(tmp_path, definition):
    rows = score_rows(definition, 3000)
    scores = write_scores(tmp_path / "scores", rows, 7)
    out = tmp_path / "keep.npy"
    figures = run("filter", scores, f"--out={out}", "--rules=stage1,stage2", "--min_side=64")
    causes = [rules.fault(row, ("stage1", "stage2"), rules.Stage1(min_side=64)) for row in rows]
    expected = [n for n, cause in enumerate(causes) if cause is None]
    np.testing.assert_array_equal(np.load(out), expected)
    removed = dict(collections.Counter(cause for cause in causes if cause))
    assert figures == {"records": 3000, "kept": len(expected), "removed": removed}
    assert len(removed) > 5


def test_dedup_equals_plain_python(tmp_path, definition):
    rows, held_out = (score_rows(definition, *about) for about in ((240, 1), (30, 2)))
    held_out[3]["thumbnail"] = rows[5]["thumbnail"]
    scores = write_scores(tmp_path / "scores", rows, 5)
    exclude = write_scores(tmp_path / "held_out", held_out, 2)
    out = tmp_path / "keep.npy"
    figures = run("dedup", scores, f"--out={out}", f"--exclude={exclude}", "--by=images")
    before, known = (
        [definition.Known(np.frombuffer(row["thumbnail"] or bytes(576), np.uint8)) for row in some]
        for some in (held_out, rows)
    )
    gone = {
        n for n in range(len(rows))
        if any(known[n].near(other) for other in [*before, *known[:n]])
    }
    assert 5 in gone and len(gone) > 20
    np.testing.assert_array_equal(np.load(out), sorted(set(range(len(rows))) - gone))
    assert figures["removed"] == {"images": len(gone)} and figures["records"] == 240


def test_the_lists_apply_to_the_source_that_was_scored(tmp_path):
    """From shards to a list and back: the records that stay are those that the list names."""
    scoring.score("scenes/test_single", tmp_path / "scores")
    out = tmp_path / "keep.npy"
    figures = run("filter", tmp_path / "scores", f"--out={out}", "--min_side=32", "--rules=stage1")
    kept = sources.Selected(sources.open_source("scenes/test_single", 48), str(out))
    assert len(kept) == figures["kept"] == 840


def test_missing_score_files_are_told(tmp_path, definition):
    scores = write_scores(tmp_path / "scores", score_rows(definition, 20), 3)
    (scores / "000001-x.parquet").unlink()
    with pytest.raises(AssertionError, match="lacks the score files of 1 shards, the first is"):
        run("filter", scores, f"--out={tmp_path}/keep.npy")


def test_scores_of_an_earlier_version_are_told(tmp_path, definition):
    scores = write_scores(tmp_path / "scores", score_rows(definition, 20), 1)
    path = scores / "000000-x.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["thumbnail"]), path)
    with pytest.raises(AssertionError, match="no column 'thumbnail': it is of an earlier version"):
        run("dedup", scores, f"--out={tmp_path}/keep.npy")
