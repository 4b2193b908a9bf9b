"""What the main job keeps in its work directory besides checkpoints, so that it never works twice.

<workdir>/record.json          seconds by phase, peak memory, what each stage started from, export
          evaluations/*.json   figures and details of each evaluated checkpoint
"""

import base64
import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Record:
    """The file record.json, written after every change."""

    def __init__(self, workdir: Path):
        self._file = workdir / "record.json"
        self._evaluations = workdir / "evaluations"
        self.values: dict[str, Any] = {
            "seconds": {},
            "peak_rss_gib": 0.0,
            "origins": {},
            "export": {},
            **(read_json(self._file) or {}),
        }

    def save(self) -> None:
        self.values["peak_rss_gib"] = max(self.values["peak_rss_gib"], peak_rss_gib())
        write_json(self._file, self.values)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase, also when it is interrupted."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = self.values["seconds"]
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - start, 2)
            self.save()

    def metrics(self) -> dict[str, float]:
        """`seconds.<phase>`, their sum, and `peak_rss_gib`, over all runs in this directory."""
        seconds = self.values["seconds"]
        named = {f"seconds.{phase}": value for phase, value in seconds.items()}
        total = {"seconds.total": round(sum(seconds.values()), 2)}
        return {**named, **total, "peak_rss_gib": round(self.values["peak_rss_gib"], 3)}

    def evaluation(
        self, name: str, key: Mapping[str, Any], compute: Callable[[], tuple[dict, dict]]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures, details) of `compute`, or those kept from a run with the same key."""
        file = self._evaluations / f"{name}.json"
        key = json.loads(json.dumps(key))
        kept = read_json(file)
        if kept is not None and kept.get("key") == key:
            return kept["figures"], _decoded(kept["details"])
        with self.phase(f"evaluate.{name}"):
            figures, details = compute()
            self._evaluations.mkdir(exist_ok=True)
            values = {"key": key, "figures": figures, "details": _encoded(details)}
            write_json(file, values)
        # As a later run will read them, so that both runs show the same.
        return figures, _decoded(json.loads(json.dumps(values["details"])))


def peak_rss_gib() -> float:
    """Largest resident memory so far of this process, or of a child if that was larger, in GiB."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = max(resource.getrusage(w).ru_maxrss for w in who)
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no whole one (it will be computed again)."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(file: Path, value: Any) -> None:
    """Write a file that is complete or, after an interruption, the one before."""
    temporary = file.with_name(f"{file.name}.tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)


def _encoded(value: Any) -> Any:
    """Nested dicts and lists with numpy arrays as values that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): _encoded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, np.ndarray):
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": str(value.dtype), "shape": list(value.shape), "base64": content}
    return value.item() if isinstance(value, np.generic) else value


def _decoded(value: Any) -> Any:
    """The inverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__array__" in value:
        content = np.frombuffer(base64.b64decode(value["base64"]), value["__array__"])
        return content.reshape(value["shape"])
    return {name: _decoded(item) for name, item in value.items()}
