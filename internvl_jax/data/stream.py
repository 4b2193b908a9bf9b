"""Batches in order: which records a batch holds, what replaces a bad one, and reading ahead.

Everything here is a function of the data, the seed and the number of the batch. Processes and
workers only share out the work.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import hashlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from internvl_jax.data.errors import RecordError

_ATTEMPTS = 20  # records tried in place of a bad one
_ALLOWANCE = 10_000  # records in which the fraction of bad ones is first judged
_CLOSING = 5.0  # seconds that the end of a reader is waited for
_TOLD = 3  # bad records of each cause that are printed one by one


class StreamError(RuntimeError):
    """The data cannot go on: too many bad records, or a reader that hangs or has died."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was left out: its place, the cause (`errors.CAUSES`) and the message."""

    place: str
    cause: str
    message: str


class Batches(grain.MapDataset):
    """Batch number → (arrays of its rows, the records skipped for it, their ids), endless.

    places: example number → (source number, record number).
    make: (source number, handle, generator) → example, a dict of arrays, or RecordError.
    rows: the places in a batch of the examples to make.
    """

    def __init__(
        self,
        places: grain.MapDataset,
        sources: Sequence[Any],
        make: Callable[[int, Any, np.random.Generator], dict],
        batch_size: int,
        rows: Sequence[int],
        seed: int,
    ):
        super().__init__(places)
        self._places, self._sources, self._make = places, tuple(sources), make
        self._batch_size, self._rows, self._seed = batch_size, tuple(rows), seed

    def __len__(self) -> int:
        return len(self._places) // self._batch_size

    def numbers(self, step: int) -> list[int]:
        """Numbers of the examples in this process's part of a batch."""
        return [step * self._batch_size + row for row in self._rows]

    def ids(self, step: int) -> list[str]:
        """The records that the rows are to hold, "SOURCE:RECORD", if none of them is bad."""
        return ["{}:{}".format(*self._places[n]) for n in self.numbers(step)]

    def __getitem__(self, step):
        if isinstance(step, slice):
            return self.slice(step)
        skipped: list[Skipped] = []
        examples, ids = self._examples(self.numbers(step), skipped)
        batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
        return batch, tuple(dataclasses.astuple(s) for s in skipped), ids

    def _examples(self, numbers: Sequence[int], skipped: list[Skipped]) -> tuple[list, list[str]]:
        """The examples of these numbers and the ids of their records; tells what was skipped."""
        places = [self._places[n] for n in numbers]
        handles = self._fetch(places)
        examples, ids = [], []
        for number, place, handle in zip(numbers, places, handles, strict=True):
            example, index = self._example(number, *place, handle, skipped)
            examples.append(example)
            ids.append(f"{place[0]}:{index}")
        return examples, ids

    def _fetch(self, places):
        """Handles of records; those of one source are read together."""
        of_source = collections.defaultdict(list)
        for position, (source, index) in enumerate(places):
            of_source[source].append((position, index))
        handles = [None] * len(places)
        for source, wanted in of_source.items():
            found = self._sources[source].fetch([index for _, index in wanted])
            for (position, _), handle in zip(wanted, found, strict=True):
                handles[position] = handle
        return handles

    def _example(self, number, source, index, handle, skipped):
        opened = self._sources[source]
        for attempt in range(_ATTEMPTS):
            try:
                if isinstance(handle, RecordError):
                    raise handle
                return self._make(source, handle, generator(self._seed, number)), index
            except RecordError as error:
                last = error.at(opened.place(index))
                skipped.append(Skipped(last.place, last.cause, last.message))
            index = _other(self._seed, number, attempt, len(opened))
            (handle,) = opened.fetch([index])
        raise StreamError(
            f"{_ATTEMPTS} records in a row cannot be used; the last is {last}. "
            "`internvl-jax data validate` lists them all"
        )


def generator(seed: int, number: int) -> np.random.Generator:
    """Random numbers of one example: those of Grain's random maps for the same seed."""
    bits = np.random.Philox(seed)
    state = bits.state
    state["state"]["counter"] = np.array([0, 0, 0, number], np.uint64)
    bits.state = state
    return np.random.Generator(bits)


def _other(seed, number, attempt, count):
    """The record tried in place of a bad one."""
    digest = hashlib.sha256(f"{seed} {number} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % count


class Ids(grain.MapDataset):
    """The ids of batches alone: batch number → ({"ids": strings}, (), ids)."""

    def __init__(self, batches: Batches):
        super().__init__(batches)
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step):
        if isinstance(step, slice):
            return self.slice(step)
        ids = self._batches.ids(step)
        return {"ids": np.array(ids)}, (), ids


class Reader(Iterator[dict[str, np.ndarray]]):
    """Batches from `start` on, prepared ahead. Close it after use.

    workers: processes that make batches; 0: `threads` threads of this one. timeout: seconds that
    a batch may take, after which all threads' stacks are printed and StreamError is raised.
    max_bad_fraction: share of bad records above which StreamError is raised, judged from the
    10,000th record on, or as soon as more are bad than that many records may have.

    skipped: how many records were left out so far, by cause; seen: records used; ids: which
    records the rows of the last batch hold.
    """

    def __init__(
        self,
        batches: Batches | Ids,
        start: int,
        *,
        workers: int = 0,
        threads: int = 2,
        ahead: int = 4,
        timeout: float = 600,
        max_bad_fraction: float = 1e-3,
    ):
        self.skipped: collections.Counter[str] = collections.Counter()
        self.seen, self.ids = 0, []
        self._timeout, self._max_bad_fraction = timeout, max_bad_fraction
        self._batches, self._next = batches, start
        self._stop = threading.Event()
        self._inner, self._threads = None, threads
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain has flags, of which we set none
                flags.FLAGS.mark_as_parsed()
            # A slice begins at `start` for any number of workers, without a state to restore.
            rest = batches[start : len(batches)].to_iter_dataset(grain.ReadOptions(num_threads=1))
            options = grain.MultiprocessingOptions(num_workers=workers)
            self._inner = iter(rest.mp_prefetch(options))
            jobs = [self._from_workers]
            self._results: queue.Queue = queue.Queue(maxsize=1)
        else:
            self._lock = threading.Lock()
            self._free = threading.Semaphore(max(ahead, threads))
            self._claimed = start
            self._results_at: dict[int, queue.Queue] = collections.defaultdict(queue.Queue)
            jobs = [self._in_threads] * threads
        # Daemon threads: one that hangs must not keep the process from ending.
        self._jobs = [
            threading.Thread(target=job, daemon=True, name="internvl_jax data") for job in jobs
        ]
        for job in self._jobs:
            job.start()

    def __next__(self) -> dict[str, np.ndarray]:
        if self._stop.is_set():
            raise StopIteration
        results = self._results if self._inner is not None else self._slot(self._next)
        try:
            value = results.get(timeout=self._timeout)
        except queue.Empty:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            raise StreamError(
                f"no batch came from the data within {self._timeout:g} s (batch {self._next}); a "
                "reader hangs: where, the stacks above tell. data.timeout sets the limit"
            ) from None
        if isinstance(value, BaseException):
            raise value
        if self._inner is None:
            with self._lock:
                del self._results_at[self._next]
            self._free.release()
        self._next += 1
        batch, skipped, self.ids = value
        self._count(sum(name.count("+") + 1 for name in self.ids), skipped)
        return batch

    def close(self) -> None:
        self._stop.set()
        if self._inner is not None:
            with contextlib.suppress(Exception):
                self._inner.close()
            # A batch that is held at the end of the process would leave its shared memory behind.
            self._jobs[0].join(_CLOSING)
            with contextlib.suppress(queue.Empty):
                while True:
                    self._results.get_nowait()
        else:
            self._free.release(self._threads)  # those that wait see that they are to stop

    def _slot(self, step):
        with self._lock:
            return self._results_at[step]

    def _in_threads(self):
        while True:
            self._free.acquire()
            with self._lock:
                if self._stop.is_set():
                    return
                step, self._claimed = self._claimed, self._claimed + 1
                slot = self._results_at[step]
            try:
                slot.put(self._batches[step])
            except BaseException as error:
                slot.put(error)
                return

    def _from_workers(self):
        try:
            while not self._stop.is_set():
                value = next(self._inner)
                while not self._stop.is_set():
                    with contextlib.suppress(queue.Full):
                        self._results.put(value, timeout=1)
                        break
        except BaseException as error:
            if not isinstance(error, ValueError | StreamError | ImportError):
                error = StreamError(f"a worker of the data has died: {error}")
            self._results.put(error)

    def _count(self, records, skipped):
        self.seen += records
        for place, cause, message in skipped:
            self.skipped[cause] += 1
            if self.skipped[cause] <= _TOLD:
                more = "; more of these are only counted" if self.skipped[cause] == _TOLD else ""
                print(f"skipped {place}: {message} ({cause}{more})", file=sys.stderr)
        bad = sum(self.skipped.values())
        if skipped and bad > self._max_bad_fraction * max(self.seen, _ALLOWANCE):
            place, cause, message = skipped[-1]
            causes = ", ".join(f"{n} {c}" for c, n in self.skipped.most_common())
            raise StreamError(
                f"{bad} of {self.seen} records cannot be used ({causes}), more than "
                f"data.max_bad_fraction={self._max_bad_fraction:g} allows; the last is {place}: "
                f"{message}. `internvl-jax data validate` lists them all"
            )
