"""Preemption with the real launch scripts: saved, started again, and continued where it was.

The command is `internvl-jax train` on a real small model. What a cloud would do is done by the
programs of stand_ins/: the rest, from the launcher to the signal handler, is what runs on a pod.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compiling import XLA_FLAGS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "train" / "fast_config.py"
STAND_INS = Path(__file__).with_name("stand_ins")
TRAIN = [
    "internvl-jax", "train", f"--config={CONFIG}", "--workdir=run", "--config.checkpoint.every=500",
]  # fmt: skip
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "HOME": os.environ.get("HOME", "/"),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": XLA_FLAGS,
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "tests_train"),
    "PAUSE": "1",
}


class Job:
    """A launch script in a process group of its own, with its output in a file."""

    def __init__(self, command, folder, **variables):
        self.log = folder / f"{Path(command[0]).name}.log"
        self.file = self.log.open("ab")
        self.process = subprocess.Popen(
            command, cwd=folder, env={**ENVIRONMENT, **variables}, stdin=subprocess.DEVNULL,
            stdout=self.file, stderr=self.file, start_new_session=True,
        )  # fmt: skip

    def finish(self):
        return self.process.wait(timeout=300)

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.file.close()


@pytest.fixture
def start(tmp_path):
    jobs = []

    def launch(command, **variables):
        jobs.append(Job(list(map(str, command)), tmp_path, **variables))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.end()


def wait_for(pattern, log, job, count=1):
    end = time.monotonic() + 300
    while True:
        text = log.read_text() if log.exists() else ""
        if len(found := re.findall(pattern, text)) >= count:
            return found
        assert time.monotonic() < end and job.process.poll() is None, text
        time.sleep(0.02)


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def children(process):
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_supervisor_saves_on_sigterm_and_its_repetition_goes_on(start, tmp_path):
    command = [ROOT / "launch" / "supervise.sh", *TRAIN, "--config.steps=100000"]
    job = start(command, EXIT_FILE=str(tmp_path / "exit"))
    wait_for(r"step 3/", job.log, job)
    sent = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    job.process.send_signal(signal.SIGTERM)  # the platform repeats itself; it is passed on once
    assert job.finish() == 143, job.log.read_text()
    assert time.monotonic() - sent < 30
    assert (tmp_path / "exit").read_text() == "143\n"
    (saved,) = steps(tmp_path / "run")
    assert f"saved step {saved} of 100000" in job.log.read_text()
    assert "second signal" not in job.log.read_text()

    job = start([*command[:-1], f"--config.steps={saved + 2}"], EXIT_FILE=str(tmp_path / "exit"))
    assert job.finish() == 0, job.log.read_text()
    assert (tmp_path / "exit").read_text() == "0\n"
    assert f"at step {saved}\n" in job.log.read_text()
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, saved + 3))


def test_supervisor_starts_again_after_a_notice_and_after_a_crash(start, tmp_path):
    job = start([ROOT / "launch" / "supervise.sh", *TRAIN, "--config.steps=100000"])
    wait_for(r"step 3/", job.log, job)
    # A notice that reaches the command alone: it saves, and is started again.
    os.kill(children(job.process.pid)[0], signal.SIGTERM)
    ((saved,),) = [wait_for(r"continuing .* at step (\d+)", job.log, job)]
    wait_for(rf"step {int(saved) + 3}/", job.log, job)
    # A crash: what was done since the last checkpoint is done again.
    os.kill(children(job.process.pid)[0], signal.SIGKILL)
    assert wait_for(r"continuing .* at step (\d+)", job.log, job, count=2) == [saved, saved]
    assert "exit code 137 (failure 1 of 10)" in job.log.read_text()
    wait_for(rf"step {int(saved) + 3}/", job.log, job, count=2)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 143

    # Of the time since the first start, that of kept updates: the same step later has less of it.
    shares = {}
    for row in rows(tmp_path / "run"):
        assert 0 <= row["goodput"] < 1
        shares.setdefault(row["step"], []).append(row["goodput"])
    assert any(len(values) == 2 for values in shares.values())
    for values in shares.values():
        assert values == sorted(values, reverse=True)


def test_supervisor_gives_up_where_repetition_does_not_help(start, tmp_path):
    supervise = ROOT / "launch" / "supervise.sh"
    job = start([supervise, "internvl-jax", "train", "--config=nonsense", "--workdir=run"])
    assert job.finish() == 2
    assert "starting it again" not in job.log.read_text()
    job = start([supervise, "bash", "-c", "echo again; exit 7"], ATTEMPTS="3", PAUSE="0")
    assert job.finish() == 7
    assert job.log.read_text().count("again\n") == 3
    assert "3 failures in a row" in job.log.read_text()


@pytest.mark.slow
def test_queued_resource_taken_away_is_asked_for_again_and_continues(start, tmp_path):
    cloud = tmp_path / "cloud"
    (cloud / "bucket").mkdir(parents=True)
    environment = {
        "CLOUD": str(cloud),
        "PATH": f"{STAND_INS}:{ENVIRONMENT['PATH']}",
        "NAME": "stage1", "ZONE": "us-east5-b", "TYPE": "v6e-1", "RUNTIME": "v2-alpha-tpuv6e",
        "BUCKET": "my-bucket", "TIER": "spot", "INTERVAL": "1",
    }  # fmt: skip
    # A host starts with the bucket mounted, and the package installed.
    gcloud = tmp_path / "gcloud"
    gcloud.mkdir()
    wrapper = gcloud / "gcloud"
    wrapper.write_text(
        f'#!/usr/bin/env bash\n"{STAND_INS}/gcloud" "$@" || exit\n'
        'if [[ "$3 $4" == "queued-resources create" ]]; then\n'
        '  mkdir -p "$CLOUD/host/venv/bin"\n  ln -s "$CLOUD/bucket" "$CLOUD/host/bucket"\n'
        '  printf "#!/bin/sh\\n" >"$CLOUD/host/venv/bin/pip"\n'
        '  chmod +x "$CLOUD/host/venv/bin/pip"\nfi\n'
    )
    wrapper.chmod(0o755)
    environment["PATH"] = f"{gcloud}:{environment['PATH']}"
    launcher = ROOT / "launch" / "queued_resource.sh"
    job = start([launcher, "watch", *TRAIN, "--config.steps=600"], **environment)
    log = cloud / "host" / "internvl_jax.log"
    wait_for(r"step 3/", log, job)

    # The platform takes the slice away: a signal, a while to save, and the host is gone.
    process = int((cloud / "internvl-jax.pid").read_text())
    os.kill(process, signal.SIGTERM)
    wait_for(r"saved step \d+ of 600", log, job)
    saved = int(re.search(r"saved step (\d+)", log.read_text())[1])
    while Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    log.unlink()
    (cloud / "state").write_text("SUSPENDED\n")

    assert job.finish() == 0, job.log.read_text()
    output = job.log.read_text()
    assert "SUSPENDED" in output and "asking again" in output
    assert "the command is done" in output
    assert f"continuing {cloud / 'bucket' / 'run'} at step {saved}" in log.read_text()
    assert rows(cloud / "bucket" / "run")[-1]["step"] == 600
    calls = (cloud / "calls").read_text()
    assert calls.count("queued-resources create stage1") == 2
    assert calls.count("queued-resources delete stage1") == 1


@pytest.mark.slow
def test_slurm_job_goes_back_into_the_queue_and_continues(start, tmp_path):
    environment = {
        "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "WORKDIR": str(tmp_path / "run"),
        "VENV": str(Path(sys.executable).parents[1]), "SLURM_JOB_ID": "7",
    }  # fmt: skip
    # The parts of Slurm that the script calls: one task, and a queue that is a file.
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\necho $$ >task\nexec "$@"\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$*" >>queue\n')
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "$*" >>signals\nkill -TERM $(cat task)\n')
    for name in ("srun", "scontrol", "scancel"):
        (tmp_path / name).chmod(0o755)
    command = ["bash", ROOT / "launch" / "slurm.sbatch", TRAIN[2], *TRAIN[4:]]
    job = start([*command, "--config.steps=100000"], **environment)
    wait_for(r"step 3/", job.log, job)
    job.process.send_signal(signal.SIGUSR1)
    job.process.send_signal(signal.SIGUSR1)
    assert job.finish() == 143, job.log.read_text()
    assert (tmp_path / "signals").read_text() == "--signal=TERM 7\n"
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
    (saved,) = steps(tmp_path / "run")
    job = start([*command, f"--config.steps={saved + 2}"], **environment)
    assert job.finish() == 0, job.log.read_text()
    assert f"at step {saved}\n" in job.log.read_text()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
