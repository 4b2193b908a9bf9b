import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax.plan import compiling, plan

ARGUMENTS = 2**30
ALWAYS = {
    "fits", "topology", "chips", "params_trained", "params_frozen", "hbm_gib", "model_tflops"
}  # fmt: skip
OF_A_PROGRAM = {
    "argument_gib", "temp_gib", "peak_gib", "collective_gb", "exposed_gb", "estimated_step_s",
    "estimated_mfu", "compile_s",
}  # fmt: skip


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (502.97G) exceeds available HBM (15.75G).",
            503.97,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 48.40G of 15.75G hbm. Exceeded hbm capacity by 32.65G.",
            48.40,
        ),
        ("Used 512.5M of 15.75G hbm", 0.5005),
    ],
)
def test_what_a_program_would_have_needed(message, gib):
    assert compiling.needed_bytes(message, ARGUMENTS) / 2**30 == pytest.approx(gib, rel=1e-3)


def test_a_wrong_topology_is_an_error_before_anything_is_loaded():
    command = [sys.executable, "-m", "internvl_jax.cli", "plan", "--config=stage1_contrastive"]
    done = subprocess.run(
        [*command, "--topology=v9:2x2"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "v5e:16x16" in done.stderr


def test_the_printed_calibration_is_the_measured_one():
    results = Path(__file__).parents[2] / "benchmarks/results/plan_calibration.json"
    recipes = json.loads(results.read_text(encoding="utf-8"))["recipes"]
    errors = [recipe["error"] for recipe in recipes if recipe["error"] is not None]
    assert tuple(round(error, 2) for error in errors) == plan.ERRORS


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ((0.22,), "off by +22 % in the one published run compared"),
        ((0.22, -0.1, 0.05), "off by -10 to +22 %, median 10 %, in 3 published runs compared"),
    ],
)
def test_a_calibration_in_words(errors, words):
    assert plan.calibration(errors) == words


def _plan(*flags):
    """The last line of `internvl-jax plan --json`, and all that it printed."""
    command = [sys.executable, "-m", "internvl_jax.cli", "plan", "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_a_plan_is_one_object_on_the_last_line():
    answer, printed = _plan("--config=stage1_contrastive:tiny", "--topology=v5e:2x2")
    assert answer["fits"] and answer["chips"] == 4
    assert set(answer) >= ALWAYS | OF_A_PROGRAM
    assert 0 < answer["argument_gib"] < answer["peak_gib"] < answer["hbm_gib"]
    assert "estimate" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "source", "setting"),
    [
        ("--config.chunks=1", "compiler", "raise chunks (now 1)"),
        ("--config.mesh.fsdp=8", "count", "raise mesh.fsdp"),
    ],
)
def test_what_cannot_fit_is_an_answer_with_the_setting_to_change(flag, source, setting):
    flags = ("--config=stage1_contrastive", "--topology=v5e:16x16", flag)
    answer, printed = _plan(*flags)
    assert set(answer) >= ALWAYS and not answer["fits"]
    assert answer["needed_gib"] > answer["hbm_gib"]
    assert answer["needed_source"].startswith(source)
    assert setting in answer["advice"] and answer["advice"] in printed
