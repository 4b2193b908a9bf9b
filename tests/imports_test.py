"""Imports flow one way, and what a Colab user imports needs few packages."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "internvl_jax"

# part → the parts of the package that it may import; what is not listed may import everything.
ALLOWED = {
    "rules": set(),
    "sharding": set(),
    "compiler": {"sharding"},
    "kernels": {"sharding"},
    "models": {"kernels", "rules", "sharding"},
    "ring": {"sharding"},
    "losses": {"ring", "sharding"},
    "objectives": {"kernels", "losses", "models", "sharding"},
    "decoding": {"models", "sharding"},
    "beam_search": {"decoding", "models", "sharding"},
    "generate": {"beam_search", "decoding", "models", "sharding"},
    "data": set(),
    "evals": {
        "beam_search",
        "data",
        "decoding",
        "generate",
        "kernels",
        "models",
        "rules",
        "sharding",
    },
    "convert": {"models", "rules", "sharding"},
    "train": {
        "compiler",
        "data",
        "evals",
        "kernels",
        "losses",
        "models",
        "objectives",
        "rules",
        "sharding",
    },
    "plan": {"compiler", "data", "kernels", "models", "objectives", "rules", "sharding", "train"},
    "serving": {"decoding", "generate", "models", "sharding"},
    "slots": {"models", "serving"},
    "quantising": {"models", "rules"},
    "loading": {
        "convert",
        "data",
        "decoding",
        "evals",
        "kernels",
        "models",
        "quantising",
        "rules",
        "serving",
        "sharding",
        "train",
    },
    "adapters": {"data", "loading", "models", "sharding"},
    "server": {"data", "loading", "models", "serving", "slots"},
    "web": {"data", "demo", "evals", "loading", "models", "server"},
    "conversion": {"convert", "models", "train"},
    "configuration": {"data", "evals", "models", "objectives"},
}
HOST_ONLY = {"jax", "flax", "optax", "orbax", "torch"}
SLOW_ONLY = {"torch", "transformers", "libtpu"}  # `make test` does not install them


def imported(file: Path) -> set[str]:
    """Absolute names that a file imports anywhere, inside functions too."""
    return _names(file, ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def _names(file: Path, nodes: Iterable[ast.AST]) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    for file in files(part):
        inside = {n.split(".")[1] for n in imported(file) if n.startswith("internvl_jax.")}
        wrong = inside - ALLOWED[part] - {part}
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_every_part_of_the_package_has_its_arrows():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}
    assert parts - set(ALLOWED) <= {"__init__", "cli", "commands", "demo"}


def test_data_runs_on_hosts_without_an_accelerator_library():
    for file in files("data"):
        wrong = {name.split(".")[0] for name in imported(file)} & HOST_ONLY
        assert not wrong, f"{file.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_quick_tests_are_found_without_the_packages_of_the_slow_ones():
    tests = PACKAGE.parent / "tests"
    modules = {".".join(f.relative_to(tests.parent).with_suffix("").parts): f
               for f in tests.rglob("*.py")}  # fmt: skip

    def loaded(file: Path) -> set[str]:
        """What starts with the file, through the test modules that it imports."""
        own = _names(file, ast.parse(file.read_text(encoding="utf-8")).body)
        helpers = {f for name, f in modules.items() for n in own if f"{n}.".startswith(f"{name}.")}
        return own.union(*map(loaded, helpers - {file}))

    for file in sorted(tests.rglob("*_test.py")):
        wrong = {name.split(".")[0] for name in loaded(file)} & SLOW_ONLY
        assert not wrong, f"{file.relative_to(tests)} imports {sorted(wrong)} as it is collected"


def test_only_the_experiment_boundary_knows_config_dicts():
    for part in set(ALLOWED) - {"configuration", "train"}:
        for file in files(part):
            assert not any(name.startswith("ml_collections") for name in imported(file)), file


@pytest.mark.parametrize("module", ["internvl_jax.models", "internvl_jax.kernels"])
def test_models_and_kernels_need_only_jax_flax_and_numpy(module):
    code = f"""if True:
        import sys, jax, flax.nnx, numpy
        before = set(sys.modules)
        import {module}
        print(*(set(sys.modules) - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert loaded <= {"internvl_jax", "jax", "jaxlib", "flax", "numpy"}
