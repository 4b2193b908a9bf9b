import os
import subprocess
import sys

import pytest

from internvl_jax.plan import compiling

ARGUMENTS = 2**30


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
