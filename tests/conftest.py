"""Every test runs on eight fake CPU devices with full float32 products.

Programs run once or twice here, so the compiler is told not to optimise them: tests spend most of
their time in it.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
for flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
):
    if flag.split("=")[0] not in flags:
        flags = f"{flags} {flag}"
os.environ["XLA_FLAGS"] = flags.strip()

# One process at a time plans with the TPU compiler, by a lock among the temporary files. With files
# of its own, no worker waits for another.
if "PYTEST_XDIST_WORKER" in os.environ:
    own = tempfile.mkdtemp(prefix="internvl_jax_tests_")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["TMPDIR"] = tempfile.tempdir = own

import jax  # noqa: E402

jax.config.update("jax_default_matmul_precision", "float32")
