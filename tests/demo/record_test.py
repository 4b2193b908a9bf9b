"""What the main job keeps."""

import json

import numpy as np
import pytest

from internvl_jax.demo.record import Record


def test_an_evaluation_is_computed_once_per_key_and_read_back_whole(tmp_path):
    calls = []
    details = {
        "hits": np.arange(6, dtype=np.int64).reshape(2, 3),
        "right": np.array([True, False]),
        "captions": ("빨간 별", "un círculo"),
        "nested": {"maps": np.float32([[0.1]])},
    }

    def compute():
        calls.append(1)
        return {"a": 0.5}, details

    for key, count in (({"step": 1}, 1), ({"step": 1}, 1), ({"step": 2}, 2)):
        figures, read = Record(tmp_path).evaluation("stage", key, compute)
        assert len(calls) == count and figures == {"a": 0.5}
        np.testing.assert_array_equal(read["hits"], details["hits"])
        assert read["hits"].dtype == np.int64 and read["right"].dtype == bool
        assert read["captions"] == list(details["captions"])
        np.testing.assert_array_equal(read["nested"]["maps"], details["nested"]["maps"])


def test_seconds_add_up_over_runs_and_interruptions(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), Record(tmp_path).phase("language"):
        raise KeyboardInterrupt
    with Record(tmp_path).phase("language"):
        pass
    metrics = Record(tmp_path).metrics()
    assert metrics["seconds.language"] == metrics["seconds.total"] == 5.0
    assert metrics["peak_rss_gib"] > 0.01
    assert json.loads((tmp_path / "record.json").read_text())["seconds"] == {"language": 5.0}
