import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from internvl_jax import sharding
from internvl_jax.plan import topology

HOLD = """
import sys
from internvl_jax.plan import topology
with topology.opened("v5e:2x2") as devices:
    print(len(devices), "devices", flush=True)
    sys.stdin.readline()
"""


def _start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(folder)},
    )


def test_without_libtpu_a_plan_names_the_command_that_installs_it(tmp_path):
    """An environment as this one, but for that package."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("libtpu"):
            (tmp_path / entry.name).symlink_to(entry)
    paths = (tmp_path, Path(__file__).parents[2])
    command = [sys.executable, "-S", "-m", "internvl_jax.cli", "plan", "--topology=v5e:2x2"]
    done = subprocess.run(
        [*command, "--config=stage1_contrastive:tiny"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: planning needs the TPU compiler, libtpu; install it with: "
        "pip install 'internvl-jax[plan]'\n"
    )


@pytest.mark.slow
def test_a_second_plan_waits_for_the_first_and_says_so(tmp_path):
    with _start(tmp_path) as first:
        assert first.stdout.readline() == "4 devices\n"
        with _start(tmp_path) as second:
            waiting = second.stderr.readline()
            assert "another plan is using the TPU compiler" in waiting
            assert f"process {first.pid}" in waiting
            first.communicate("\n")
            assert second.stdout.readline() == "4 devices\n"
            second.communicate("\n")
    assert (first.returncode, second.returncode) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:16x16", "v6e:16x16", "v4:4x8x8", "v5p:8x8x8"])
def test_the_stages_mesh_lies_on_every_pod(name):
    with topology.opened(name) as devices:
        mesh = sharding.make_mesh(replica=-1, fsdp=128, devices=devices)
    assert dict(mesh.shape) == {"replica": len(devices) // 128, "fsdp": 128, "tensor": 1}
    assert set(mesh.devices.flat) == set(devices)
