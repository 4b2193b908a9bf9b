"""Every test runs on eight fake CPU devices with full float32 products.

Programs run once or twice here, so tests spend most of their time in the compiler. It is told not
to optimise, and what it made is kept in build/: the same small models come again in other files, in
the other workers, in the commands that tests start, and in the next run.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.compiling import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
for flag in ("--xla_force_host_platform_device_count=8", *FLAGS):
    if flag.split("=")[0] not in flags:
        flags = f"{flags} {flag}"
os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / "build" / "xla_tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# One process at a time plans with the TPU compiler, by a lock among the temporary files. With files
# of its own, no worker waits for another.
if "PYTEST_XDIST_WORKER" in os.environ:
    own = tempfile.mkdtemp(prefix="internvl_jax_tests_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = own

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: one that came last would keep a worker busy alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
