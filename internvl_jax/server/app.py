"""The HTTP side: routes of the OpenAI API over loaded models, limits, errors, server-sent events.

What is refused: a request beyond `Limits.requests` in work at once with 429 and Retry-After, before
its body is read; a body that is too large with 413, one that comes too slowly with 408; anything
else that is wrong with 400 or 404. Errors have the API's form {"error": {...}}.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from internvl_jax.data import image
from internvl_jax.loading import Model
from internvl_jax.models import ChatConfig, InternVLConfig
from internvl_jax.server import batching, requests
from internvl_jax.server.features import Features
from internvl_jax.server.requests import ApiError, Limits

_DECODERS = 2  # images decoded at once: each may hold `Limits.pixels` pixels for a moment
_DRAIN_SECONDS = 5


class Server:
    """Routes over {name: model}. `app` is the ASGI application."""

    def __init__(self, models: Mapping[str, Model], limits: Limits):
        self._models, self._limits = dict(models), limits
        self._created = int(time.time())
        self._parsers = ThreadPoolExecutor(_DECODERS, "parser")
        self._batcher = batching.Batcher(limits.batch)
        self._chats = {
            name: batching.Chats(model, limits)
            for name, model in self._models.items()
            if isinstance(model.config, ChatConfig)
        }
        self._features = {  # (model, mode; None for texts)
            (name, mode): Features(model, mode, limits.batch)
            for name, model in self._models.items()
            if isinstance(model.config, InternVLConfig)
            for mode in (None, "c", "g")[: 3 if model.config.num_queries else 2]
        }
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._list),
                Route("/v1/models/{name:path}", self._retrieve),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            ],
            middleware=[Middleware(_Admission, limits=limits)],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse, Exception: _broken},
            lifespan=self._lifespan,
        )

    def warm(self) -> Iterator[str]:
        """Compile every program that a request within the limits can need; yields what it was.

        For before the first request; a server that skips it compiles when a request asks.
        """
        for name, work in self._chats.items():
            yield from (f"{name}: {what}" for what in work.warm())
        for (name, _), work in self._features.items():
            yield from (f"{name}: {what}" for what in work.warm())

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self._batcher.close)
        self._parsers.shutdown()

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _list(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(n) for n in self._models]})

    async def _retrieve(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._model(name)
        return JSONResponse(self._entry(name))

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "internvl_jax"}

    def _model(self, name: str) -> Model:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(404, f"there is no model {name[:100]!r}; choose from {known}", "model")
        return self._models[name]

    async def _body(self, request: Request) -> bytes:
        most = self._limits.upload_bytes
        declared = request.headers.get("content-length", "0")
        too_large = ApiError(413, f"the request is larger than the {most} bytes allowed")
        if int(declared) > most:  # the HTTP parser has seen that it is a number
            await _drain(request.receive, most)
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, "the body took too long to arrive") from None
        except ClientDisconnect:
            raise ApiError(400, "the client left") from None
        return b"".join(parts)

    async def _parsed(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._parsers, function, *arguments)

    # ---- chat ---------------------------------------------------------------------------------

    def _read_chat(self, body: bytes) -> tuple[requests.ChatRequest, batching.ChatRow]:
        asked = requests.chat_request(requests.parse_json(body), self._limits)
        model = self._model(asked.model)
        if asked.model not in self._chats:
            raise ApiError(400, f"{asked.model} is not a chat model", "model")
        prompt = model.chat_prompt(asked.rounds)
        if len(prompt) > self._limits.prompt_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, images included; "
                f"{self._limits.prompt_tokens} are allowed",
                "messages",
            )
        size = model.config.input_size
        pixels = [image.square(picture, size) for picture in asked.images]  # small from here on
        row = batching.ChatRow(prompt, pixels, asked.sampling, asked.max_tokens, asked.stop)
        return asked, row

    async def _chat(self, request: Request) -> Response:
        asked, row = await self._parsed(self._read_chat, await self._body(request))
        job = batching.Job(self._chats[asked.model], row)
        self._batcher.submit(job)
        reply = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }
        if asked.stream:
            events = self._events(job, reply, len(row.prompt), asked.usage_in_stream)
            return _EventStream(events, job)
        text, piece = "", batching.Piece("", 0)
        while piece.finish is None:
            piece = await self._next(job, request)
            text += piece.text
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": piece.finish, "logprobs": None}
        usage = _usage(len(row.prompt), piece.tokens)
        return JSONResponse(
            {**reply, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def _next(self, job: batching.Job, request: Request) -> Any:
        """The job's next result; a client that left sets it free."""
        while True:
            try:
                return await asyncio.wait_for(job.get(), 1.0)
            except TimeoutError:
                if await request.is_disconnected():
                    job.gone = True
                    raise ApiError(400, "the client left") from None

    async def _events(
        self, job: batching.Job, reply: dict, prompt_tokens: int, usage: bool
    ) -> AsyncIterator[str]:
        def event(choices: list, **more: Any) -> str:
            chunk = {**reply, "object": "chat.completion.chunk", "choices": choices, **more}
            return f"data: {json.dumps(chunk)}\n\n"

        def choice(delta: dict, finish: str | None = None) -> list:
            return [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]

        yield event(choice({"role": "assistant", "content": ""}))
        piece = batching.Piece("", 0)
        while piece.finish is None:
            piece = await job.get()
            if piece.text:
                yield event(choice({"content": piece.text}))
        yield event(choice({}, piece.finish))
        if usage:
            yield event([], usage=_usage(prompt_tokens, piece.tokens))
        yield "data: [DONE]\n\n"

    # ---- embeddings ---------------------------------------------------------------------------

    def _read_embeddings(
        self, body: bytes
    ) -> tuple[requests.EmbeddingsRequest, list[tuple[Features, dict[int, np.ndarray]]], int]:
        """The request, what is to be computed as (work, {position: row}), and its tokens."""
        asked = requests.embeddings_request(requests.parse_json(body), self._limits)
        model = self._model(asked.model)
        if not isinstance(model.config, InternVLConfig):
            raise ApiError(400, f"{asked.model} has no embeddings; an InternVL has", "model")
        if asked.dimensions not in (None, model.config.embed_dim):
            raise ApiError(400, f"dimensions can only be {model.config.embed_dim}", "dimensions")
        mode = asked.mode or ("g" if model.config.num_queries else "c")
        if mode == "g" and not model.config.num_queries:
            raise ApiError(400, f"{asked.model} has no mode g: it is an InternVL-C", "mode")
        vit = model.config.vit
        pixels, texts = {}, {}
        for position, value in enumerate(asked.inputs):
            if isinstance(value, Image.Image):
                pixels[position] = image.square(value, vit.image_size)
            else:
                (ids,) = model.text_ids([value])
                texts[position] = ids[: max(int((ids > 0).sum()), 1)]
        tokens = sum(map(len, texts.values())) + len(pixels) * (1 + vit.grid**2)
        parts = [(mode, pixels), (None, texts)]
        return asked, [(self._features[asked.model, m], rows) for m, rows in parts if rows], tokens

    async def _embeddings(self, request: Request) -> Response:
        asked, parts, tokens = await self._parsed(
            self._read_embeddings, await self._body(request)
        )
        jobs = [
            self._batcher.submit(batching.Job(work, list(inputs.values())))
            for work, inputs in parts
        ]
        rows: dict[int, np.ndarray] = {}
        for (_, inputs), job in zip(parts, jobs, strict=True):
            features = await self._next(job, request)
            features = features / np.linalg.norm(features, axis=-1, keepdims=True)
            rows |= dict(zip(inputs, features, strict=True))
        data = [
            {
                "object": "embedding",
                "index": n,
                "embedding": requests.encoded(rows[n], asked.as_base64),
            }
            for n in range(len(rows))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


class _EventStream(StreamingResponse):
    """Server-sent events of a job, which is given up when the client leaves at any moment."""

    def __init__(self, events: AsyncIterator[str], job: batching.Job):
        super().__init__(events, media_type="text/event-stream")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.gone = True


class _Admission:
    """Answers 429 to a POST while `limits.requests` others are in work, streams included."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits, self._busy = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._busy >= self._limits.requests:
            error = ApiError(429, f"{self._limits.requests} requests are in work; try again soon")
            response = await _refuse(Request(scope), error)
            await _drain(receive, self._limits.upload_bytes)
            await response(scope, receive, send)
            return
        self._busy += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._busy -= 1


async def _drain(receive: Receive, most: int) -> None:
    """Reads a body away: a client that still sends may never see the answer otherwise."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b"")) + 1
                if not message.get("more_body", False):
                    return


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


async def _refuse(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # an unknown path or method
        error = ApiError(error.status_code, str(error.detail))
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    detail = {"message": error.message, "type": kind, "param": error.param, "code": None}
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse({"error": detail}, error.status, headers)


async def _broken(_request: Request, _error: Exception) -> Response:
    detail = {"message": "the server failed", "type": "server_error", "param": None, "code": None}
    return JSONResponse({"error": detail}, 500)
