"""Where the numbers of a run go: JSON lines, TensorBoard and the terminal; and how fast it runs."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboard.summary import Writer
from tqdm import tqdm

# Dense bf16 peak of one JAX device in FLOP/s, by `device_kind`. Google Cloud's TPU pages
# (docs.cloud.google.com/tpu/docs/v4, …/v5e, …/v5p, …/v6e) and NVIDIA's data sheets (A100, H100 and
# H200, without sparsity). A chip that is not listed gets no utilisation figure.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

_GIB = 2**30


class _JsonLines:
    """One JSON object per line, appended; a line cut off by a crash is closed first."""

    def __init__(self, path: Path):
        cut_off = False
        if path.exists() and path.stat().st_size:
            with path.open("rb") as old:
                old.seek(-1, os.SEEK_END)
                cut_off = old.read(1) != b"\n"
        self._file = path.open("a", encoding="utf-8")
        if cut_off:
            self._file.write("\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN: strings keep the line readable for every parser.
        row = {n: v if math.isfinite(v) else str(v) for n, v in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, path: Path):
        self._writer = Writer(str(path))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Terminal:
    """A progress bar on a terminal, plain lines elsewhere."""

    # Of interest only when something is wrong, and then reported in a line of their own.
    _LEFT_OUT = ("skipped", "nonfinite_in_a_row", "host_rss_gib", "data_wait_seconds")

    def __init__(self, start: int, steps: int):
        self._steps = steps
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def advance(self, step: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        shown = {n: v for n, v in values.items() if n not in self._LEFT_OUT}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if "step_seconds" in values:
            text += f"  eta {values['step_seconds'] * (self._steps - step):.0f} s"
        self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class MetricsLog:
    """Writes each row of metrics to every place; no failing place ever stops the run.

    Only process 0 writes. A place that fails is reported once on stderr and tried again with the
    next row, so that a disk that was full for a while leaves a gap and no more.
    """

    def __init__(self, workdir: Path, *, start: int, steps: int):
        self._writers: dict[str, Any] = {}
        self._warned: set[str] = set()
        self._terminal = None
        if jax.process_index() != 0:
            return
        self._terminal = _Terminal(start, steps)
        self._open("metrics.jsonl", lambda: _JsonLines(workdir / "metrics.jsonl"))
        self._open("tensorboard", lambda: _TensorBoard(workdir / "tensorboard"))
        self._writers["terminal"] = self._terminal

    def _open(self, name: str, make: Callable[[], Any]) -> None:
        def attempt():
            self._writers[name] = make()

        self._guard(name, attempt)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if name not in self._warned:
                self._warned.add(name)
                print(
                    f"warning: metrics writer {name} failed ({error}); training goes on",
                    file=sys.stderr,
                    flush=True,
                )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row: scalars by name, after `step` updates."""
        for name, writer in self._writers.items():
            self._guard(name, lambda writer=writer: writer.write(step, values))

    def advance(self, step: int, loss: float) -> None:
        """Move the progress bar."""
        if self._terminal is not None:
            self._guard("terminal", lambda: self._terminal.advance(step, loss))

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        if self._terminal is not None:
            self._guard("terminal", lambda: self._terminal.say(text))

    def close(self) -> None:
        for name, writer in self._writers.items():
            self._guard(name, writer.close)


class Speed:
    """Mean step time, throughput, data wait and utilisation since the last report.

    Times are from the monotonic clock: a jump of the system's clock changes none of them.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._waited = time.monotonic(), 0, 0.0
        self._images, self._tokens, self._flops = 0.0, 0.0, 0.0

    def count(self, images: float, waited: float, tokens: float = 0, flops: float = 0) -> None:
        """Record one finished step: its images and the seconds spent waiting for them.

        tokens: of text and images, without padding. flops: of the model, over all devices.
        """
        self._steps += 1
        self._waited += waited
        self._images += images
        self._tokens += tokens
        self._flops += flops

    def exclude(self, seconds: float) -> None:
        """Leave out time that went into something else than steps: saving, evaluating."""
        self._since += seconds

    def report(self) -> dict[str, float]:
        """The figures of the steps since the last report; empty if there were none."""
        elapsed = time.monotonic() - self._since
        if not self._steps or elapsed <= 0:
            return {}
        figures = {
            "step_seconds": elapsed / self._steps,
            "images_per_second": self._images / elapsed,
            "data_wait_seconds": self._waited / self._steps,
            "host_rss_gib": host_rss() / _GIB,
        }
        if self._tokens:
            figures["tokens_per_second"] = self._tokens / elapsed
        peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak and self._flops:
            capacity = peak * jax.device_count() * elapsed
            figures["model_flops_utilisation"] = self._flops / capacity
        self._reset()
        return figures


def images_in(batch: Mapping[str, Any]) -> int:
    """Images in a batch ([B, H, W, 3] or [B, M, H, W, 3]); examples, if it has none."""
    if "image" in batch:
        return int(np.prod(batch["image"].shape[:-3]))
    return len(next(iter(batch.values())))


def host_rss() -> int:
    """Resident memory of this process in bytes: now on Linux, the peak elsewhere."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class SpikeDetector:
    """Finds losses far above the running mean: loss > mean + `sigmas` · standard deviation.

    Mean and variance are exponential averages over about `window` steps; nothing is reported
    before that many losses were seen. A spike enters the averages cut down to the limit, so that
    one of them hides no other, and a lasting change of level is reported for a while only.
    """

    def __init__(self, sigmas: float = 6.0, window: int = 50):
        self._sigmas, self._window = sigmas, window
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def update(self, loss: float) -> str | None:
        """Take the next loss; a description if it is a spike, else None."""
        if not math.isfinite(loss):
            return None
        # A loss that hardly varies must not make noise of a percent a spike.
        deviation = max(math.sqrt(self._variance), 0.01 * abs(self._mean))
        limit = self._mean + self._sigmas * deviation
        spike = None
        if self._count >= self._window and loss > limit:
            spike = f"loss {loss:.4g} against a mean of {self._mean:.4g} ± {deviation:.2g}"
            loss = limit
        self._count += 1
        rate = max(1 / self._count, 1 / self._window)
        difference = loss - self._mean
        self._mean += rate * difference
        self._variance = (1 - rate) * (self._variance + rate * difference**2)
        return spike
