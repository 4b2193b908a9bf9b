"""Faults that a long run meets, tried on real processes with real signals."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from internvl_jax.train.checkpoint import committed_steps
from tests.train import driver


@pytest.fixture(scope="module")
def cache():
    # Kept between sessions: the second `make test` compiles nothing here.
    return Path(__file__).parents[2] / ".cache" / "tests_train"


@pytest.fixture
def start(tmp_path, cache):
    """start(workdir, fault=…, steps=…, …) → Run; whatever still runs at the end is killed."""
    runs = []

    def launch(workdir, fault=None, **overrides):
        log = tmp_path / f"{len(runs)}.log"
        runs.append(driver.Run(log, driver.train, str(workdir), cache, overrides, fault))
        return runs[-1]

    yield launch
    for run in runs:
        run.process.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """An uninterrupted run of 12 steps with a checkpoint at each."""
    path = tmp_path_factory.mktemp("reference")
    run = driver.Run(
        path / "log", driver.train, str(path / "run"), cache, {"steps": 12, "checkpoint.every": 1}
    )
    assert run.finish() == 0, run.output()
    return path / "run"


@pytest.fixture
def damaged(tmp_path, reference):
    """A copy of the reference run, to be damaged."""
    return shutil.copytree(reference, tmp_path / "damaged_run")


def digests(workdir, step):
    meta = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {path: leaf["digest"] for path, leaf in meta["leaves"].items()}


def losses(workdir):
    """{step: loss}, of a step done twice the later one."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def steps(workdir):
    return committed_steps(workdir / "checkpoints")


def test_killed_runs_continue_bit_for_bit(start, tmp_path, reference):
    run = start(tmp_path / "run", steps=12, **{"checkpoint.every": 2})
    run.wait_for("step 5/")
    run.send(signal.SIGKILL)
    assert run.finish() == -signal.SIGKILL
    saved = steps(tmp_path / "run")
    run = start(tmp_path / "run", steps=12, **{"checkpoint.every": 2})
    assert run.finish() == 0, run.output()
    assert f"continuing {tmp_path / 'run'} at step " in run.output()
    assert saved[0] == 2
    assert losses(tmp_path / "run") == losses(reference)
    assert digests(tmp_path / "run", 12) == digests(reference, 12)
    assert "taking over" in run.output()


def test_same_seed_same_checkpoints_other_seed_others(start, tmp_path, reference):
    same = start(tmp_path / "same", steps=3)
    other = start(tmp_path / "other", steps=3, seed=1)
    assert same.finish() == 0 and other.finish() == 0
    assert digests(tmp_path / "same", 3) == digests(reference, 3)
    assert losses(tmp_path / "same") == {k: v for k, v in losses(reference).items() if k <= 3}
    different = digests(tmp_path / "other", 3)
    kernel = "params/llama/blocks/attn/q/kernel"
    assert different[kernel] != digests(reference, 3)[kernel]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_first_signal_saves_the_current_step_and_says_how_to_go_on(start, tmp_path, number, code):
    run = start(tmp_path / "run", steps=100000, **{"checkpoint.every": 100000})
    run.wait_for("step 3/")
    run.send(number)
    assert run.finish() == code, run.output()
    (step,) = steps(tmp_path / "run")
    assert f"saved step {step} of 100000 in {tmp_path / 'run'}" in run.output()
    assert "the same command with the same --workdir continues" in run.output()
    run = start(tmp_path / "run", steps=step + 1)
    assert run.finish() == 0, run.output()
    assert f"at step {step}\n" in run.output()
    assert list(losses(tmp_path / "run")) == list(range(1, step + 2))


def test_second_signal_ends_at_once_without_half_a_commit(start, tmp_path):
    run = start(tmp_path / "run", steps=100000, **{"checkpoint.every": 100000})
    run.wait_for("step 3/")
    # Stopped, the process finds both signals waiting when it goes on.
    run.send(signal.SIGSTOP)
    run.send(signal.SIGTERM)
    run.send(signal.SIGINT)
    sent = time.monotonic()
    run.send(signal.SIGCONT)
    assert run.finish() in (130, 143), run.output()
    assert time.monotonic() - sent < 5
    assert "second signal: ending at once" in run.output()
    run = start(tmp_path / "run", steps=2)
    assert run.finish() == 0, run.output()
    assert [p for p in (tmp_path / "run/checkpoints").iterdir() if "tmp" in p.name] == []


def test_kills_while_saving_leave_the_newest_committed_step(tmp_path):
    directory = tmp_path / "checkpoints"
    generator = random.Random(0)
    restored, removed = [], 0
    for trial in range(11):
        run = driver.Run(tmp_path / f"{trial}.log", driver.save_again_and_again, str(directory))
        run.wait_for("restored ")
        restored.append(int(run.output().split("restored ")[1].split()[0]))
        removed += "removed " in run.output()
        committed = restored[-1]
        # When the third save begins, the first is committed and the second is under way.
        run.wait_for(f"saving {committed + 3}\n")
        if trial % 2:
            # Between the writing of arrays and the commit.
            while not list(directory.glob("*tmp*")):
                time.sleep(0.0005)
        else:
            time.sleep(generator.uniform(0, 0.3))
        run.send(signal.SIGKILL)
        assert run.finish() == -signal.SIGKILL
        finished = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
        assert max(finished) > committed
    # Each start found the newest step whole (it checks every array) and went on from there.
    assert restored == sorted(set(restored)) and len(restored) == 11
    assert removed >= 1


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_in_half(file):
    os.truncate(file, file.stat().st_size // 2)


def remove(file):
    file.unlink()


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (flip_a_bit, "arrays"),
        (cut_in_half, "arrays"),
        (remove, "arrays"),
        (empty, "params/manifest.ocdbt"),
        (empty, "meta/metadata"),
    ],
)
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(
    start, damaged, reference, damage, place
):
    newest = damaged / "checkpoints" / "12"
    file = largest_file(newest / "params") if place == "arrays" else newest / place
    damage(file)
    run = start(damaged, steps=13)
    assert run.finish() == 0, run.output()
    warnings = [line for line in run.output().splitlines() if line.startswith("warning: step 12")]
    assert len(warnings) == 1
    assert ("meta" if "meta" in place else "params") in warnings[0]
    assert "Traceback" not in run.output()
    assert f"continuing {damaged} at step 11" in run.output()
    # The damaged step is kept aside, and its successor is the one the uninterrupted run made.
    assert (damaged / "damaged" / "12").is_dir()
    assert losses(damaged)[12] == losses(reference)[12]


def test_full_disk_during_a_save_leaves_the_steps_before(start, tmp_path):
    run = start(tmp_path / "run", steps=2)
    assert run.finish() == 0, run.output()
    before = digests(tmp_path / "run", 2)
    run = start(tmp_path / "run", fault=("disk", 20_000), steps=6)
    assert run.finish() == 1, run.output()
    # The save at step 4 is reported and training goes on; the last one must succeed.
    assert "Traceback" not in run.output()
    assert "warning: saving step 4 failed (" in run.output()
    assert "error: saving step 6 failed (" in run.output()
    assert "MiB free in " in run.output()
    assert steps(tmp_path / "run") == [2]
    run = start(tmp_path / "run", steps=4)
    assert run.finish() == 0, run.output()
    assert digests(tmp_path / "run", 2) == before
    assert steps(tmp_path / "run") == [2, 4]


def test_read_only_work_directory_fails_before_anything_compiles(start, tmp_path):
    parent = tmp_path / "read_only"
    parent.mkdir(mode=0o555)
    begun = time.monotonic()
    run = start(parent / "run", fault=("permissions",))
    assert run.finish() == 1
    assert time.monotonic() - begun < 10
    assert f"error: cannot write in work directory {parent / 'run'}: Permission denied" in (
        run.output()
    )
    assert "Traceback" not in run.output()


def test_second_run_in_a_work_directory_is_refused(start, tmp_path):
    first = start(tmp_path / "run", steps=100000)
    first.wait_for("step 1/")
    second = start(tmp_path / "run", steps=100000)
    assert second.finish() == 1
    holder = f"in use by process {first.process.pid} on {socket.gethostname()}"
    assert holder in second.output()
    first.send(signal.SIGTERM)
    assert first.finish() == 143


def test_changed_config_is_shown_or_refused(start, damaged):
    run = start(damaged, steps=13, **{"optimizer.weight_decay": 0.2})
    assert run.finish() == 0, run.output()
    assert "config changed on resume: optimizer.weight_decay: 0.1 → 0.2" in run.output()
    before = (damaged / "config.json").read_text()
    for overrides, message in [
        ({"model.width": 32}, "holds another experiment: model.width: 16 → 32"),
        ({"data.languages": "en"}, "the data of the run in"),
    ]:
        run = start(damaged, steps=14, **overrides)
        assert run.finish() == 1
        assert message in run.output()
        assert "Traceback" not in run.output()
    assert "data.languages: ['en', 'zh', 'ko', 'es'] → ['en']" in run.output()
    assert (damaged / "config.json").read_text() == before


def test_updates_that_are_not_finite_are_skipped_and_counted(start, tmp_path, reference):
    run = start(tmp_path / "run", fault=("nan", 3), steps=6, **{"checkpoint.every": 1})
    assert run.finish() == 0, run.output()
    assert "step 4: loss inf" in run.output()
    weights = {step: digests(tmp_path / "run", step) for step in (3, 4, 5)}
    changed = {path for path in weights[3] if weights[3][path] != weights[4][path]}
    assert changed == {f"counters/{n}" for n in ("step", "skipped", "nonfinite_in_a_row")}
    assert weights[5] != weights[4]
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert losses(tmp_path / "run")[3] == losses(reference)[3]


def test_too_many_skipped_updates_in_a_row_stop_the_run_with_a_report(start, tmp_path):
    run = start(
        tmp_path / "run", fault=("nan", 4, 5, 6), steps=20, max_nonfinite=3,
        **{"checkpoint.every": 4},
    )  # fmt: skip
    assert run.finish() == 1
    (report,) = [x for x in run.output().splitlines() if x.startswith("error: ")]
    assert "not finite in 3 updates in a row (steps 5 to 7)" in report
    assert "the parameters are those of step 4" in report
    assert "Saved steps: 4" in report
    assert "batch 4 of the pipeline with fingerprint" in report
    assert steps(tmp_path / "run") == [4]


def test_loss_spike_is_logged_with_its_batch(start, tmp_path):
    run = start(
        tmp_path / "run", fault=("spike", 60), steps=64, log_every=8,
        **{"checkpoint.every": 64, "optimizer.learning_rate": "(('.*',1e-4),)"},
    )  # fmt: skip
    assert run.finish() == 0, run.output()
    (line,) = [x for x in run.output().splitlines() if x.startswith("loss spike")]
    assert line.startswith("loss spike at step 61: loss ")
    assert "batch 60 of the pipeline with fingerprint" in line


def test_jumping_clock_changes_nothing(start, tmp_path, reference):
    # A save during which a year passes may be given up as too slow; it is tried again.
    run = start(tmp_path / "run", fault=("clock",), steps=4)
    assert run.finish() == 0, run.output()
    assert "Traceback" not in run.output()
    assert digests(tmp_path / "run", 4) == digests(reference, 4)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == list(losses(reference).values())[:4]
    assert all(0 < row["step_seconds"] < 1000 for row in rows)


def test_failing_metrics_writers_never_stop_training(start, tmp_path, reference):
    run_directory = tmp_path / "run"
    (run_directory / "metrics.jsonl").mkdir(parents=True)
    (run_directory / "tensorboard").write_text("in the way")
    run = start(run_directory, steps=4)
    assert run.finish() == 0, run.output()
    assert run.output().count("warning: metrics writer metrics.jsonl failed") == 1
    assert run.output().count("warning: metrics writer tensorboard failed") == 1
    assert digests(run_directory, 4) == digests(reference, 4)
