"""One finished main job, on the real configs made small, for all tests here.

The job runs in a process of its own, as the command line would run it: on one device, since it is
not about sharding, and compiled without optimisation, since its few steps are not about speed.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_jax.demo import job
from tests.compiling import XLA_FLAGS

ROOT = Path(__file__).resolve().parents[2]
EVALS = {
    "retrieval": {"count": 12},
    "caption": {"count": 4, "num_beams": 1, "max_new_tokens": 6},
    "chat": {"scenes": 6, "digits": 2, "max_new_tokens": 4},
}


def small_configs():
    """The stages of the demo, a few steps of the tiny size; one of those in a row that do alike."""
    stages = list(job.shipped_configs().items())
    objectives = [*(config.objective for _, config in stages[1:]), None]
    kept, start = {}, ()
    for (stage, config), following in zip(stages, objectives, strict=True):
        start = start or config.init_from
        if config.objective == following:
            continue
        with config.unlocked(), config.ignore_type():
            config.init_from = start
            config.model.update(size="tiny", unroll=1)
            config.data.image_size = 32
            config.optimizer.warmup_steps = 1
            config.update(batch_size=8, steps=2, log_every=1)
        kept[stage], start = config, ()
    return kept


@pytest.fixture(scope="session")
def run_small():
    """(work directory, configs) → metrics: the job with small evaluations, in this process."""

    def run(workdir, configs=None):
        return job.run(workdir, configs or small_configs(), EVALS)

    return run


@pytest.fixture
def configs():
    return small_configs()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(work directory, metrics) of a finished job."""
    workdir = tmp_path_factory.mktemp("demo")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, str(workdir)],
        env={**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return workdir, json.loads((workdir / "metrics.json").read_text())


@pytest.fixture(scope="session")
def load_script():
    """Name → module of a file in scripts/."""

    def load(name):
        file = ROOT / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


if __name__ == "__main__":
    job.run(sys.argv[1], small_configs(), EVALS)
