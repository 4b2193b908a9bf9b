"""One thread that owns the device, and what it does with the rows that wait.

Chats go on step by step side by side: one joins as soon as a row is free, whatever the others are
at (`slots`). Inputs to embed that wait together are computed together. The thread goes round:
who waits joins, one batch of inputs is embedded, every chat gets a token. A row whose client is
gone is free.
"""

import asyncio
import collections
import contextlib
import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from internvl_jax.data.tokenizer import Detokenizer
from internvl_jax.loading import Model
from internvl_jax.server.features import Features
from internvl_jax.server.requests import Limits
from internvl_jax.serving import Sampling
from internvl_jax.slots import Slots

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """Something for the device and the way back to the request that waits for it.

    work: who does it, a `Chats` (then `payload` is a ChatRow) or `Features` (a list of rows).
    """

    work: "Chats | Features"
    payload: Any
    gone: bool = False
    results: asyncio.Queue = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def put(self, result: Any) -> None:
        """Hand a result to the request, from the device's thread; an exception is raised there."""
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the server is shutting down
            self.gone = True

    async def get(self) -> Any:
        """The next result."""
        result = await self.results.get()
        if isinstance(result, Exception):
            raise result
        return result


class Batcher:
    """The queue and its thread. `most`: jobs of a batch of inputs to embed."""

    def __init__(self, most: int):
        self._most = most
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._busy: set[Chats] = set()  # with chats that go on
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Queue a job."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End the thread after the step that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> tuple[list[Job], list[Job]] | None:
        """(chats for which a row is free, inputs to embed together); None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._busy or self._closed)
            if self._closed:
                return None
            self._waiting = collections.deque(job for job in self._waiting if not job.gone)
            joining, free = [], {}
            for job in self._waiting:
                if isinstance(job.work, Chats):
                    left = free.setdefault(job.work, job.work.free)
                    if left:
                        joining.append(job)
                        free[job.work] = left - 1
            inputs = [job for job in self._waiting if isinstance(job.work, Features)]
            same = (job for job in inputs if job.work is inputs[0].work)
            batch = list(itertools.islice(same, self._most))
            chosen = set(map(id, [*joining, *batch]))
            self._waiting = collections.deque(j for j in self._waiting if id(j) not in chosen)
            return joining, batch

    def _work(self) -> None:
        while (found := self._next()) is not None:
            joining, batch = found
            for job in joining:
                job.work.join(job)
                self._busy.add(job.work)
            if batch:
                _embed(batch)
            for chats in list(self._busy):
                if not chats.step():
                    self._busy.discard(chats)


def _embed(jobs: list[Job]) -> None:
    try:
        rows = jobs[0].work([x for job in jobs for x in job.payload])
    except Exception as error:  # one broken batch must not end the server
        log.exception("a batch failed")
        for job in jobs:
            job.put(error)
        return
    position = 0
    for job in jobs:
        job.put(rows[position : position + len(job.payload)])
        position += len(job.payload)


@dataclass(frozen=True)
class ChatRow:
    """A chat in a batch: prompt ids, images, settings, and the texts that end it."""

    prompt: list[int]
    images: list[Any]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; the last one says why it ended ("stop" or "length")."""

    text: str
    tokens: int
    finish: str | None = None


class Chats:
    """The chats of one model that go on at this moment, a row each."""

    def __init__(self, model: Model, limits: Limits):
        self._tokenizer = model.tokenizer
        self._rows: list[tuple[Job, _Answer] | None] = [None] * limits.batch
        self._slots = Slots(
            model.config,
            model.params,
            rows=limits.batch,
            prompt_tokens=limits.prompt_tokens,
            new_tokens=limits.new_tokens,
            images=limits.images,
        )

    @property
    def free(self) -> int:
        """Rows without a chat."""
        return self._rows.count(None)

    def warm(self) -> Iterator[str]:
        """Compile every program; yields what it was. Before the first `join`."""
        return self._slots.warm()

    def join(self, job: Job) -> None:
        """Begin a chat in a free row."""
        row, asked = self._rows.index(None), job.payload
        self._rows[row] = (job, _Answer(Detokenizer(self._tokenizer), asked))
        with self._guarded():
            self._slots.join(row, asked.prompt, asked.images, asked.sampling)

    def step(self) -> bool:
        """One more token for every chat; whether any is left."""
        with self._guarded():
            tokens = self._slots.step()
            for n, row in enumerate(self._rows):
                if row is None:
                    continue
                job, answer = row
                if not job.gone:
                    job.put(answer.push(int(tokens[n]), self._tokenizer.eos_id))
                if job.gone or answer.done:
                    self._rows[n] = None
        return self.free < len(self._rows)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails ends the chats that go on, not the server."""
        try:
            yield
        except Exception as error:
            log.exception("a step failed")
            for job, _ in filter(None, self._rows):
                job.put(error)
            self._rows = [None] * len(self._rows)
            self._slots.clear()


class _Answer:
    """A row's text as it grows: cut at its stop texts, which are never shown in part."""

    def __init__(self, text: Detokenizer, row: ChatRow):
        self._text, self._row = text, row
        self._held = ""
        self._tokens = 0
        self.done = False

    def push(self, token: int, end: int) -> Piece:
        self._tokens += 1
        ended = token == end
        self._held += self._text.end() if ended else self._text.push(token)
        full = self._tokens >= self._row.max_tokens
        if full and not ended:
            self._held += self._text.end()
        places = [p for p in map(self._held.find, self._row.stop) if p >= 0]
        if places:
            return self._last(self._held[: min(places)], "stop")
        if ended or full:
            return self._last(self._held, "stop" if ended else "length")
        keep = max((self._overlap(stop) for stop in self._row.stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[-keep:] * bool(keep)
        return Piece(shown, self._tokens)

    def _overlap(self, stop: str) -> int:
        """Length of the longest beginning of `stop` that ends the text held."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _last(self, text: str, finish: str) -> Piece:
        self.done = True
        return Piece(text, self._tokens, finish)
