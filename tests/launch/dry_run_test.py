"""The launchers: what they would run, as recorded; and what they refuse.

`python tests/launch/dry_run_test.py` records anew what is then to be read in the diff.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("recorded")
PLACE = {"NAME": "stage1", "ZONE": "us-east5-b", "PROJECT": "my-project"}
POD = {**PLACE, "TYPE": "v5litepod-256", "RUNTIME": "v2-alpha-tpuv5-lite", "BUCKET": "my-bucket"}
CLUSTER = {**PLACE, "CLUSTER": "pods", "TYPE": "v5litepod-256", "IMAGE": "docker.io/me/internvl"}
GKE = {
    "NAME": "stage1", "ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "16x16", "HOSTS": "64",
    "CHIPS_PER_HOST": "4", "IMAGE": "docker.io/me/internvl", "BUCKET": "my-bucket",
    "ACCOUNT": "trainer", "SLICES": "2",
}  # fmt: skip
TRAIN = [
    "internvl-jax", "train", "--config=stage1_contrastive", "--workdir=runs/stage1",
    '--config.data.sources=(("jsonl:a b.jsonl", 1.0),)',
]  # fmt: skip

# name: (launcher, variables, arguments)
CASES = {
    "tpu_vm_create": (
        "tpu_vm.sh", {**PLACE, "TYPE": "v6e-1", "RUNTIME": "v2-alpha-tpuv6e", "SPOT": "yes"},
        ["create"],
    ),
    "tpu_vm_run": ("tpu_vm.sh", {**PLACE, "BUCKET": "my-bucket"}, ["run", *TRAIN]),
    "tpu_vm_status": ("tpu_vm.sh", PLACE, ["status"]),
    "tpu_vm_logs": ("tpu_vm.sh", PLACE, ["logs"]),
    "tpu_vm_stop": ("tpu_vm.sh", PLACE, ["stop"]),
    "tpu_vm_delete": ("tpu_vm.sh", PLACE, ["delete"]),
    "queued_resource_create": ("queued_resource.sh", POD, ["create"]),
    "queued_resource_create_spot": ("queued_resource.sh", {**POD, "TIER": "spot"}, ["create"]),
    "queued_resource_create_slices": (
        "queued_resource.sh", {**POD, "TIER": "reserved", "SLICES": "4"}, ["create"],
    ),
    "queued_resource_run": ("queued_resource.sh", POD, ["run", *TRAIN]),
    "queued_resource_watch_slices": (
        "queued_resource.sh", {**POD, "TIER": "spot", "SLICES": "2"}, ["watch", *TRAIN],
    ),
    "queued_resource_status": ("queued_resource.sh", PLACE, ["status"]),
    "queued_resource_logs_slices": ("queued_resource.sh", {**PLACE, "SLICES": "2"}, ["logs"]),
    "queued_resource_stop": ("queued_resource.sh", PLACE, ["stop"]),
    "queued_resource_delete": ("queued_resource.sh", PLACE, ["delete"]),
    "xpk_run": ("xpk.sh", {**CLUSTER, "STORAGE": "runs", "SLICES": "2"}, ["run", *TRAIN]),
    "xpk_status": ("xpk.sh", CLUSTER, ["status"]),
    "xpk_logs": ("xpk.sh", CLUSTER, ["logs"]),
    "xpk_delete": ("xpk.sh", CLUSTER, ["delete"]),
    "gke_run": ("gke.sh", GKE, ["run", *TRAIN]),
    "gke_status": ("gke.sh", {"NAME": "stage1"}, ["status"]),
    "gke_logs": ("gke.sh", {"NAME": "stage1"}, ["logs"]),
    "gke_delete": ("gke.sh", {"NAME": "stage1"}, ["delete"]),
    "slurm": ("slurm.sbatch", {"WORKDIR": "/runs/stage1", "VENV": "/venv"}, TRAIN[2:3] + TRAIN[4:]),
}  # fmt: skip


def call(launcher, variables, arguments):
    return subprocess.run(
        ["bash", ROOT / "launch" / launcher, *arguments],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables},
        capture_output=True,
        text=True,
        cwd="/",
    )


def dry_run(name):
    launcher, variables, arguments = CASES[name]
    result = call(launcher, variables, ["--dry-run", *arguments])
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_what_would_run(name):
    assert dry_run(name) == (RECORDED / f"{name}.txt").read_text()


def test_every_action_of_every_launcher_is_recorded():
    for launcher in ("tpu_vm.sh", "queued_resource.sh", "xpk.sh", "gke.sh"):
        text = (ROOT / "launch" / launcher).read_text()
        documented = {"run", "status", "logs", "delete"} | (
            {"create", "stop"} if "tpus" in text else set()
        )
        recorded = {case[2][0] for case in CASES.values() if case[0] == launcher}
        assert documented <= recorded, launcher


@pytest.mark.parametrize("name", CASES)
def test_each_required_variable_is_asked_for(name):
    launcher, variables, arguments = CASES[name]
    optional = {"PROJECT", "SPOT", "TIER", "SLICES", "TYPE", "IMAGE"}
    if arguments[0] in ("create", "watch"):
        optional -= {"TYPE"}
    if arguments[0] == "run" and launcher != "queued_resource.sh":
        optional -= {"TYPE", "IMAGE"}
    for variable in variables.keys() - optional:
        if arguments[0] == "create" and variable == "BUCKET":
            continue
        if launcher == "queued_resource.sh" and arguments[0] == "run" and variable == "RUNTIME":
            continue
        rest = {n: v for n, v in variables.items() if n != variable}
        result = call(launcher, rest, ["--dry-run", *arguments])
        assert result.returncode in (1, 2, 127) and result.stdout == "", (variable, result)
        assert "error: set" in result.stderr and variable in result.stderr


@pytest.mark.parametrize(
    ("launcher", "variables", "arguments", "message"),
    [
        ("tpu_vm.sh", {}, ["create"], "NAME: a name.*\n.*ZONE.*\n.*TYPE.*\n.*RUNTIME"),
        ("queued_resource.sh", {**POD, "SLICES": "two"}, ["create"], "SLICES is a number.*'two'"),
        ("queued_resource.sh", {**POD, "TIER": "cheap"}, ["create"], "TIER is spot.*'cheap'"),
        ("queued_resource.sh", {**POD, "NAME": "x; rm"}, ["create"], "NAME: .*'x; rm'"),
        ("queued_resource.sh", {**POD, "BUCKET": "gs://b"}, ["run", "a"], "without gs://"),
        ("queued_resource.sh", POD, ["run"], "run needs a command"),
        ("gke.sh", {**GKE, "TOPOLOGY": "256"}, ["run", "a"], "TOPOLOGY"),
        ("slurm.sbatch", {"WORKDIR": "/w", "VENV": "/v"}, ["--config.seed=1"], "name a config"),
    ],
)
def test_wrong_values_are_refused_before_anything_runs(launcher, variables, arguments, message):
    result = call(launcher, variables, arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    import re

    assert re.search(message, result.stderr), result.stderr


def test_help_is_the_head_of_the_file():
    for launcher in ("tpu_vm.sh", "queued_resource.sh", "xpk.sh", "gke.sh"):
        for arguments in ([], ["dance"]):
            result = call(launcher, {**POD, "CLUSTER": "c"}, arguments)
            assert result.returncode == 2
            assert f"launch/{launcher} [--dry-run]" in result.stderr
            assert "#" not in result.stderr and "set -euo" not in result.stderr


if __name__ == "__main__":
    RECORDED.mkdir(exist_ok=True)
    for case in CASES:
        (RECORDED / f"{case}.txt").write_text(dry_run(case))
