"""Metrics: rows on disk, figures of speed, and the spike detector."""

import json
import math
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from internvl_jax.train import metrics


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_reach_every_writer(tmp_path, capsys):
    log = metrics.MetricsLog(tmp_path, start=0, steps=10)
    log.write(2, {"loss": 1.5, "step_seconds": 0.5, "skipped": 0.0})
    log.write(4, {"loss": math.nan, "step_seconds": 0.5, "skipped": 1.0})
    log.close()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": 2, "loss": 1.5, "step_seconds": 0.5, "skipped": 0.0},
        {"step": 4, "loss": "nan", "step_seconds": 0.5, "skipped": 1.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors("step_seconds")] == [
        (2, 0.5),
        (4, 0.5),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "step 2/10  loss 1.5  step_seconds 0.5  eta 4 s",
        "step 4/10  loss nan  step_seconds 0.5  eta 3 s",
    ]


def test_a_line_cut_off_by_a_crash_spoils_no_later_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = metrics.MetricsLog(tmp_path, start=2, steps=4)
    log.write(3, {"loss": 1.0})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1
    assert json.loads(lines[2]) == {"step": 3, "loss": 1.0}


def test_a_failing_writer_warns_once_and_the_others_go_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    log = metrics.MetricsLog(tmp_path, start=0, steps=4)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    assert capsys.readouterr().err.count("warning: metrics writer tensorboard failed") == 1


def test_speed_counts_steps_images_and_waiting():
    began = time.monotonic()
    speed = metrics.Speed()
    assert speed.report() == {}
    batch = {"tokens": np.zeros((4, 7)), "image": np.zeros((4, 3, 8, 8, 3))}
    for _ in range(2):
        time.sleep(0.02)
        speed.count(metrics.images_in(batch), waited=0.005)
    time.sleep(0.05)
    speed.exclude(0.05)
    figures = speed.report()
    assert 0.02 <= figures["step_seconds"] <= (time.monotonic() - began - 0.05) / 2
    assert figures["images_per_second"] == pytest.approx(12 / figures["step_seconds"])
    assert figures["data_wait_seconds"] == pytest.approx(0.005)
    assert 0.01 < figures["host_rss_gib"] < 64
    assert "model_flops_utilisation" not in figures  # a CPU has no known peak
    assert speed.report() == {}
    assert metrics.images_in({"tokens": np.zeros((4, 7))}) == 4


def test_spikes_stand_out_of_the_noise_and_new_levels_are_learned():
    rng = np.random.default_rng(0)
    detector = metrics.SpikeDetector(sigmas=6, window=50)
    losses = 3 - 0.005 * np.arange(200) + 0.1 * rng.normal(size=200)
    assert [detector.update(x) for x in losses] == [None] * 200
    message = detector.update(5.0)
    assert message.startswith("loss 5 against a mean of 2.")
    assert detector.update(math.nan) is None
    assert detector.update(2.0) is None
    assert detector.update(6.0) is not None  # the first spike hides no second one
    level = [detector.update(8.0 + 0.1 * x) for x in rng.normal(size=300)]
    assert level[0] is not None and level[-1] is None


def test_no_spike_is_reported_before_the_mean_is_known():
    detector = metrics.SpikeDetector(window=50)
    assert [detector.update(x) for x in [1.0] * 20 + [100.0]] == [None] * 21
