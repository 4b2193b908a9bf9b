"""The launch files by the tools and schemas of those who read them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.launch import dry_run_test

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCHEMAS = Path(__file__).with_name("schemas")
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"])


def schema(name):
    return json.loads((SCHEMAS / f"{name}.json").read_text())


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    result = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    for script in SCRIPTS:
        sourced = script.name in ("common.sh", "cloud_tpu.sh")
        assert sourced or script.stat().st_mode & 0o100 or script.suffix == ".sbatch", script


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load(dry_run_test.dry_run("gke_run").split("'END'\n")[1].split("\nEND\n")[0])


def test_jobset_fits_its_schema(jobset):
    jsonschema.validate(jobset, schema("jobset"))
    (job,) = jobset["spec"]["replicatedJobs"]
    jsonschema.validate(job["template"], schema("job_template"))
    wrong = json.loads(json.dumps(job["template"]))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 600
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema("job_template"))


def test_jobset_restarts_after_preemption_and_leaves_time_to_save(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 64
    (container,) = pod["containers"]
    assert container["args"] == dry_run_test.TRAIN
    first, second = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert first["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert second["onExitCodes"]["values"] == [143]
    assert second["onExitCodes"]["containerName"] == container["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_skypilot_task_fits_its_schema():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, schema("skypilot"))
    # SkyPilot itself refuses to start while an environment variable is null.
    assert task["envs"]["BUCKET"] is None and task["envs"]["COMMAND"] is None
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    for part in ("setup", "run"):
        subprocess.run(
            [shellcheck, "--shell=bash", "--exclude=SC2086,SC2154", "-"],
            input=task[part], text=True, check=True,
        )  # fmt: skip


def test_the_image_copies_what_the_package_needs():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = {word for x in lines if x.startswith("COPY") for word in x.split()[1:-1]}
    for name in copied:
        assert (ROOT / name).exists(), name
    assert {"setup.py", "constraints.txt", "configs", "internvl_jax", "README.md"} <= copied
    # As process 1 a program ignores SIGTERM unless it handles it, from its first moment on.
    assert 'ENTRYPOINT ["tini", "--"]' in lines
