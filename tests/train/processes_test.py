"""Several real processes that train as one: same result, same data, and no one waits for the dead.

Each process has one CPU device; they speak through gloo, as hosts of a pod speak through their
network.
"""

import json
import re
import signal
import socket
from collections import defaultdict
from pathlib import Path

import pytest

from internvl_jax.train.checkpoint import committed_steps
from tests.train import driver

# 12 examples divide over 1, 2, 3 and 4 processes; 16 of the model's width over 1, 2 and 4.
RUN = {"batch_size": 12, "steps": 12, "checkpoint.every": 1, "log_every": 1}
REPLICAS = {"mesh.replica": -1, "mesh.fsdp": 1}


@pytest.fixture(scope="module")
def cache():
    return Path(__file__).parents[2] / ".cache" / "tests_train"


@pytest.fixture
def start(tmp_path, cache):
    """start(count, workdir, …) → the Runs of one job; whatever still runs at the end is killed.

    differing: {process: overrides of its own}; faults: {process: fault of the driver}.
    """
    runs = []

    def launch(
        count, workdir, *, limits=None, processes=None, differing=None, faults=None, **overrides
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        job = []
        for number in range(count) if processes is None else processes:
            settings = {**RUN, **overrides, **(differing or {}).get(number, {})}
            member = None if count == 1 else (number, count, port, limits or {})
            fault = (faults or {}).get(number, ("rows",))
            arguments = (str(workdir), cache, settings, fault, member)
            job.append(driver.Run(tmp_path / f"{len(runs)}.log", driver.train, *arguments))
            runs.append(job[-1])
        return job

    yield launch
    for run in runs:
        run.process.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, cache):
    """(work directory, rows) of one process that trains alone."""
    path = tmp_path_factory.mktemp("alone")
    arguments = (str(path / "run"), cache, RUN, ("rows",))
    run = driver.Run(path / "log", driver.train, *arguments)
    assert run.finish() == 0, run.output()
    return path / "run", rows([run])


def rows(job):
    """{batch: digests of its rows in the order of their digests}, of all processes together."""
    found = defaultdict(list)
    for run in job:
        for number, digests in re.findall(r"^batch (\d+) rows (.*)$", run.output(), re.M):
            found[int(number)] += digests.split()
    return {number: sorted(digests) for number, digests in found.items()}


def losses(workdir):
    """{step: loss}, of a step done twice the later one."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def newest(workdir):
    return max(committed_steps(workdir / "checkpoints"))


def test_two_processes_train_as_one_and_one_goes_on_alone(start, tmp_path, reference):
    workdir = tmp_path / "run"
    job = start(2, workdir, steps=4, **{"mesh.fsdp": 2})
    assert [run.finish() for run in job] == [0, 0], [run.output() for run in job]
    assert "2 processes with 1 devices each" in job[0].output()
    assert "step 4/4" in job[0].output() and "step 4/4" not in job[1].output()
    (alone,) = start(1, workdir)
    assert alone.finish() == 0, alone.output()
    assert "continuing" in alone.output()

    original, expected = reference
    found = rows(job) | {n: r for n, r in rows([alone]).items() if n >= 4}
    assert {n: found[n] for n in range(12)} == {n: expected[n] for n in range(12)}
    wanted = losses(original)
    assert losses(workdir) == {n: pytest.approx(wanted[n], rel=1e-5) for n in range(1, 13)}
    assert newest(workdir) == 12


def test_processes_that_differ_say_where_before_they_train(start, tmp_path):
    job = start(2, tmp_path / "run", differing={1: {"seed": 7, "optimizer.clip_norm": 2.0}})
    assert [run.finish() for run in job] == [1, 1]
    for run in job:
        message = run.output()
        assert "on process 1" in message and "config.seed is 7 instead of 0" in message, message
        assert "config.optimizer.clip_norm is 2.0 instead of 1.0" in message
    assert not (tmp_path / "run").exists()


def test_processes_with_other_code_say_so_before_they_train(start, tmp_path):
    job = start(2, tmp_path / "run", faults={1: ("code", str(tmp_path / "patched"))})
    assert [run.finish() for run in job] == [1, 1]
    for run in job:
        message = run.output()
        assert re.search(
            r"on process 1 \(\S+\) code\.internvl_jax is '(\w{12})' instead of '(?!\1)\w{12}' ",
            message,
        ), message
        assert "Start all with the same command, code and data" in message
    assert not (tmp_path / "run").exists()


def test_processes_with_other_data_say_so_before_they_train(start, tmp_path):
    """One host's copy of the file lacks what was corrected in a caption."""
    for number, caption in enumerate(("a red circle", "a red circel")):
        folder = tmp_path / f"host{number}"
        folder.mkdir()
        lines = [json.dumps({"image": f"{n}.png", "caption": caption}) for n in range(12)]
        (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    faults = {number: ("elsewhere", str(tmp_path / f"host{number}")) for number in range(2)}
    sources = {"data.sources": '(("jsonl:pairs.jsonl", 1.0),)'}
    job = start(2, tmp_path / "run", faults=faults, **sources)
    assert [run.finish() for run in job] == [1, 1]
    for run in job:
        message = run.output()
        assert re.search(r"on process 1 \(\S+\) data is '\w{64}' instead of '\w{64}' ", message)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_missing_processes_end_the_wait_with_a_message(start, tmp_path):
    limits = {"JOIN_SECONDS": 4}
    (alone,) = start(3, tmp_path / "run", processes=[0], limits=limits)
    assert alone.finish() == 1
    assert "process 0 of 3" in alone.output() and "not all the others have come" in alone.output()
    assert "Traceback" not in alone.output()


@pytest.mark.slow
def test_restarts_with_other_process_counts_continue_the_same_run(start, tmp_path, reference):
    workdir = tmp_path / "run"
    limits = {"HEARTBEAT_SECONDS": 15}
    first = start(4, workdir, limits=limits, **{"mesh.fsdp": 4}, steps=1000)
    first[0].wait_for("step 3/")
    first[2].send(signal.SIGKILL)
    codes = [run.finish() for run in first]
    assert codes[2] == -signal.SIGKILL and all(code != 0 for code in codes), codes

    killed = newest(workdir)
    second = start(2, workdir, limits=limits, **{"mesh.fsdp": 2}, steps=1000)
    second[0].wait_for(f"step {killed + 2}/")
    second[1].send(signal.SIGTERM)
    assert [run.finish() for run in second] == [143, 143], [run.output() for run in second]

    stopped = newest(workdir)
    end = stopped + 3
    third = start(3, workdir, limits=limits, **REPLICAS, steps=end)
    assert [run.finish() for run in third] == [0, 0, 0], [run.output() for run in third]
    assert f"continuing {workdir} at step {stopped}" in third[0].output()

    (alone,) = start(1, tmp_path / "alone", steps=end)
    assert alone.finish() == 0, alone.output()
    expected, wanted = rows([alone]), losses(tmp_path / "alone")
    for job, begin, stop in ((first, 0, killed), (second, killed, stopped), (third, stopped, end)):
        found = rows(job)
        assert all(found[n] == expected[n] for n in range(begin, stop))
    assert losses(workdir) == {n: pytest.approx(wanted[n], rel=1e-5) for n in range(1, end + 1)}
