"""Discovery and loading of recorded cases: inputs and outputs of the official implementation.

The environment variable INTERNVL_GOLDEN names a directory of cases; by default it is `data` beside
this file. Everything about a case (sizes, options, expected values) is read from its files, so the
tests run unchanged on other cases of the same categories.
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.convert import load_torch_layout
from internvl_jax.convert.safetensors_files import Tensors

ABSOLUTE = 2e-5  # hidden states, features, logits, losses, in float32
RELATIVE_GRADIENT, ABSOLUTE_GRADIENT = 1e-4, 1e-6

RUN = ("V", "Q", "C", "L", "G", "P", "H", "H2", "K", "I")  # categories with a test module here


def directory() -> Path:
    """The directory of cases that this run tests."""
    return Path(os.environ.get("INTERNVL_GOLDEN") or Path(__file__).parent / "data")


@dataclass(frozen=True)
class Case:
    """One recorded case; `info` is its case.json."""

    path: Path
    info: dict[str, Any]

    @property
    def category(self) -> str:
        return self.info["category"]

    @property
    def config(self) -> dict[str, Any]:
        """The recorded configuration of the official class."""
        return self.info["config"]

    @functools.cached_property
    def tensors(self) -> Tensors:
        return Tensors(self.path / "io.safetensors")

    def weights(self, file: str = "weights.safetensors") -> Tensors:
        """Official state-dict entries."""
        return Tensors(self.path / file)

    def inputs(self, name: str) -> np.ndarray:
        """Recorded input; ids and masks as int32."""
        array = self.tensors[f"in.{name}"]
        return array.astype(np.int32) if array.dtype == np.int64 else np.array(array)

    def pixels(self, name: str) -> np.ndarray:
        """Recorded image batch as [B, H, W, 3]."""
        return np.ascontiguousarray(self.inputs(name).transpose(0, 2, 3, 1))

    def load(self, scratch: Path, file: str = "weights.safetensors") -> tuple[Any, dict[str, Any]]:
        """Configuration and parameters through the public loader, as from an official directory."""
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "model.safetensors").symlink_to((self.path / file).resolve())
        legacy = "embed_dim" in self.config
        description = {"model": self.config} if legacy else self.config
        (scratch / "config.json").write_text(json.dumps(description), "utf-8")
        return load_torch_layout(scratch)


class Comparison:
    """Compares results with the recorded outputs of a case and remembers which were seen."""

    def __init__(self, case: Case):
        self.case = case
        self.left = {name[4:] for name in case.tensors if name.startswith("out.")}

    def names(self, prefix: str) -> list[str]:
        """Recorded outputs whose name starts like this."""
        return sorted(name for name in self.left if name.startswith(prefix))

    def __contains__(self, name: str) -> bool:
        return f"out.{name}" in self.case.tensors

    def expected(self, name: str) -> np.ndarray:
        """The recorded output, which then counts as compared."""
        self.left.discard(name)
        return self.case.tensors[f"out.{name}"]

    def close(self, name: str, result: Any, rows: np.ndarray | None = None) -> None:
        """`result` equals the recorded output; `rows` (bool) picks the leading axes compared."""
        expected, result = self.expected(name), np.asarray(result)
        assert result.shape == expected.shape, f"{name}: {result.shape} against {expected.shape}"
        if rows is not None:
            result, expected = result[rows], expected[rows]
        np.testing.assert_allclose(result, expected, rtol=0, atol=ABSOLUTE, err_msg=name)

    def gradient_close(self, name: str, result: np.ndarray, expected: np.ndarray) -> None:
        """max|g − ref| ≤ 1e-4 · max|ref| + 1e-6; some gradients are zero and hold noise."""
        assert result.shape == expected.shape, f"{name}: {result.shape} against {expected.shape}"
        bound = RELATIVE_GRADIENT * np.max(np.abs(expected)) + ABSOLUTE_GRADIENT
        worst = np.max(np.abs(result - expected))
        assert worst <= bound, f"gradient of {name} is off by {worst:.3g}, allowed {bound:.3g}"

    def done(self) -> None:
        """Every recorded output has been compared."""
        assert not self.left, f"not compared: {', '.join(sorted(self.left))}"


@functools.cache
def discover() -> tuple[Case, ...]:
    """Every case in the directory, in name order; fails where there is none."""
    files = sorted(directory().glob("*/case.json"))
    if not files:
        raise FileNotFoundError(f"no case.json below {directory()}")
    return tuple(Case(file.parent, json.loads(file.read_text("utf-8"))) for file in files)


def parameters(category: str) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize` for the cases of one category."""
    found = [case for case in discover() if case.category == category]
    return {"argnames": "case", "argvalues": found, "ids": [case.path.name for case in found]}
