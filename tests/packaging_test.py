"""The wheel holds the configs and assets, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy so that no build output lands in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    caches = shutil.ignore_patterns("__pycache__")
    for folder in ("internvl_jax", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=caches)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--no-index", "--wheel-dir", target, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(target.glob("internvl_jax-*.whl"))


def test_wheel_holds_every_module_config_and_asset(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"internvl_jax/{p.relative_to(ROOT / 'internvl_jax').as_posix()}"
               for p in (ROOT / "internvl_jax").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}
    configs = {f"internvl_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
    assert modules <= packed
    assert configs <= packed
    assert not any(name.startswith(("tests/", "configs/")) for name in packed)


def test_wheel_is_small_enough_to_ship(wheel):
    assert wheel.stat().st_size < 12e6  # of which at most 10 MB are the trained checkpoint


def test_configs_resolve_from_the_wheel_by_bare_name(wheel, tmp_path):
    """In an empty folder, with the unpacked wheel as the only place that has the package."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import internvl_jax, internvl_jax.configs, sys\n"
        "from internvl_jax import configuration\n"
        "assert internvl_jax.__file__.startswith(sys.path[1]), internvl_jax.__file__\n"
        "assert internvl_jax.configs.__file__.startswith(sys.path[1])\n"
        "print(configuration.load('stage1_contrastive').objective, *configuration.names())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    shipped = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    objective, *names = done.stdout.split()
    assert objective == "contrastive" and set(names) == shipped


def test_constraints_pin_every_dependency_of_the_development_install():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin and "://" not in pin and "@" not in pin for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    for needed in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "pytest", "setuptools"):
        assert needed in pinned
