"""Goodput: which share of the time since a run's first start made progress that was kept.

Productive are the seconds in which updates were computed, each update once: what was lost and done
again after a crash counts only the second time. All else is not: starting, compiling (a process's
first step), waiting for data, saving, evaluating, and the time between two processes.
"""

import contextlib
import json
import time
from pathlib import Path

import jax

_KEPT = 100  # saved steps of which the productive time is remembered: more than checkpoints are


class Goodput:
    """Productive over total time of the run in a work directory, across its restarts.

    Kept in <workdir>/goodput.json by process 0. Within a process time is monotonic; the system's
    clock tells only how long nothing ran. A file that cannot be read or written changes a figure
    and nothing else.
    """

    def __init__(self, workdir: Path, start: int):
        """start: the step that this process continues at."""
        self._file = workdir / "goodput.json"
        self._began = self._since = time.monotonic()
        self._first = True
        before, gap, self._saved = 0.0, 0.0, {0: 0.0}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(self._file.read_text())
            saved = {int(step): float(seconds) for step, seconds in record["productive"].items()}
            before, gap = float(record["total"]), max(0.0, time.time() - record["written"])
            self._saved = {step: x for step, x in saved.items() if step <= start} or self._saved
        self._before = before + gap
        self._productive = self._saved[max(self._saved)]
        self.save(start)

    def count(self, waited: float) -> None:
        """An update has ended, for whose batch the loop waited so many seconds."""
        now = time.monotonic()
        if not self._first:
            self._productive += max(0.0, now - self._since - waited)
        self._first, self._since = False, now

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into something else than updates."""
        self._since += seconds

    def share(self) -> float:
        """Productive over total time, from 0 to 1."""
        return self._productive / max(self._total(), 1e-9)

    def save(self, step: int) -> None:
        """Remember the figures of a step that a later process may continue at."""
        self._saved[step] = self._productive
        for old in sorted(self._saved)[:-_KEPT]:
            del self._saved[old]
        if jax.process_index() != 0:
            return
        record = {"total": self._total(), "written": time.time(), "productive": self._saved}
        with contextlib.suppress(OSError):
            temporary = self._file.with_name(f"{self._file.name}.tmp")
            temporary.write_text(json.dumps(record) + "\n")
            temporary.replace(self._file)

    def _total(self) -> float:
        return self._before + time.monotonic() - self._began
