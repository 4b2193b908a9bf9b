"""One thread that owns the device and runs together what waits together.

Requests of one kind that are waiting when the device becomes free form a batch: chats go on step
by step side by side, features are computed in one call. A batch that has started takes no further
rows; a row whose client is gone counts as done.
"""

import asyncio
import collections
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from internvl_jax.data.tokenizer import Detokenizer
from internvl_jax.loading import Model
from internvl_jax.serving import Sampling

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """A row for the device and the way back to the request that waits for it.

    key: jobs with equal keys may share a batch; how `run` tells them apart.
    run: takes a list of jobs, calls `put` on each as results come.
    """

    key: tuple
    run: Callable[[list["Job"]], None]
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
    """The queue and its thread. `most`: rows of a batch."""

    def __init__(self, most: int):
        self._most = most
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Queue a job."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End the thread after the batch that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[Job]:
        """The oldest job and the others that can run with it; [] at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            key = self._waiting[0].key
            same = [job for job in self._waiting if job.key == key]
            batch = list(itertools.islice(same, self._most))
            chosen = set(map(id, batch))
            self._waiting = collections.deque(j for j in self._waiting if id(j) not in chosen)
            return batch

    def _work(self) -> None:
        while batch := self._next():
            alive = [job for job in batch if not job.gone]
            if not alive:
                continue
            try:
                alive[0].run(alive)
            except Exception as error:  # one broken batch must not end the server
                log.exception("a batch failed")
                for job in alive:
                    job.put(error)


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


def chat(model: Model, most_tokens: int) -> Callable[[list[Job]], None]:
    """What runs chat jobs of a model. All answers have the same room, hence the same program."""
    end = model.tokenizer.eos_id

    def run(jobs: list[Job]) -> None:
        rows: list[ChatRow] = [job.payload for job in jobs]
        texts = [_Answer(Detokenizer(model.tokenizer), row) for row in rows]
        steps = model.stream(
            [row.prompt for row in rows],
            [row.images for row in rows],
            [row.sampling for row in rows],
            most_tokens,
        )
        for tokens in steps:
            for job, text, token in zip(jobs, texts, tokens, strict=True):
                if not text.done:
                    job.put(text.push(int(token), end))
            if all(text.done or job.gone for job, text in zip(jobs, texts, strict=True)):
                break

    return run


def embed(function: Callable[[list[Any]], np.ndarray]) -> Callable[[list[Job]], None]:
    """What runs jobs whose payload is a list of inputs; `function` gives a row for each input."""

    def run(jobs: list[Job]) -> None:
        rows = function([x for job in jobs for x in job.payload])
        position = 0
        for job in jobs:
            job.put(rows[position : position + len(job.payload)])
            position += len(job.payload)

    return run


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
