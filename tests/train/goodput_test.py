"""Goodput: the figure, and that it survives restarts, crashes and clocks."""

import json
import time

import pytest

from internvl_jax.train import goodput


def record(path):
    return json.loads((path / "goodput.json").read_text())


def test_updates_are_productive_and_all_else_is_not(tmp_path):
    run = goodput.Goodput(tmp_path, 0)
    assert run.share() == 0
    run.count(0.0)  # the first update compiles
    assert run.share() == 0
    time.sleep(0.2)
    run.count(waited=0.05)
    time.sleep(0.2)
    run.exclude(0.2)
    run.count(0.0)
    run.save(3)
    saved = record(tmp_path)
    productive = saved["productive"]["3"]
    assert 0.15 <= productive <= saved["total"] - 0.2
    assert run.share() == pytest.approx(productive / saved["total"], rel=0.2)


def test_lost_updates_and_the_time_between_processes_lower_it(tmp_path):
    (tmp_path / "goodput.json").write_text(
        json.dumps(
            {"total": 100.0, "written": time.time() - 50, "productive": {0: 0, 10: 40, 20: 80}}
        )
    )
    # Step 20 turned out to be damaged: what led from 10 to 20 is done again.
    run = goodput.Goodput(tmp_path, 10)
    assert run.share() == pytest.approx(40 / 150, rel=0.01)
    assert record(tmp_path)["productive"].keys() == {"0", "10"}
    assert record(tmp_path)["total"] == pytest.approx(150, rel=0.01)


def test_a_clock_set_back_and_a_damaged_file_change_a_figure_only(tmp_path):
    (tmp_path / "goodput.json").write_text(
        json.dumps({"total": 100.0, "written": time.time() + 1e6, "productive": {10: 40}})
    )
    assert goodput.Goodput(tmp_path, 10).share() == pytest.approx(0.4, rel=0.01)
    (tmp_path / "goodput.json").write_text('{"total": 1')
    assert goodput.Goodput(tmp_path, 10).share() == 0
    (tmp_path / "goodput.json").unlink()
    (tmp_path / "goodput.json").mkdir()
    run = goodput.Goodput(tmp_path, 10)
    run.save(11)
    assert run.share() == 0
