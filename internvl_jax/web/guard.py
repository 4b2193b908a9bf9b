"""What stands before Gradio: known routes, small bodies, no addresses to fetch, no other origin.

Gradio would fetch pictures from addresses that a request names, serve what it proxies, and take
bodies of any size. The page needs none of that.
"""

import asyncio
import json
import re
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_jax.server.requests import Limits

_API = "/gradio_api"
_GET = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.*"
    rf"|{_API}/(startup-events|app_id|theme\.css|queue/data|upload_progress|heartbeat/\w+)"
    rf"|{_API}/file=/.*"
)
_POST = re.compile(rf"{_API}/(queue/join|upload|cancel|reset)")
_JSON_BYTES = 1 << 20
_ADDRESS = re.compile(r"\s*(https?|ftp|file|data):|\s*//", re.I)
HEADERS = {
    # What the page is made of comes from here alone.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "media-src 'self' blob:; connect-src 'self' blob: data:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware; what it refuses gets 4xx."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits, self._busy = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a refusal itself and hands on the rest."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = _refused(scope)
        if refusal is not None or scope["method"] != "POST":
            await (refusal or self._app)(scope, receive, guarded)
            return
        if self._busy >= self._limits.requests:
            await PlainTextResponse("too many requests", 429)(scope, receive, guarded)
            return
        self._busy += 1
        try:
            await self._post(scope, receive, guarded)
        finally:
            self._busy -= 1

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a body on once it is there as a whole and holds nothing wrong."""
        upload = scope["path"] == f"{_API}/upload"
        most = self._limits.upload_bytes if upload else _JSON_BYTES
        refusal = None
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _body(receive, most)
        except TimeoutError:
            body, refusal = b"", PlainTextResponse("the body took too long to arrive", 408)
        if body is None:
            refusal = PlainTextResponse(f"at most {most} bytes are allowed", 413)
        elif refusal is None and not upload and _holds_address(body):
            refusal = PlainTextResponse("not JSON, or a file by its address", 400)
        await (refusal or self._app)(scope, _replayed(body or b"", receive), send)


def _refused(scope: Scope) -> PlainTextResponse | None:
    """An answer to a request for what the page does not have."""
    known = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(scope["method"])
    if known is None:
        return PlainTextResponse("unknown method", 405)
    if known.fullmatch(scope["path"]) is None:
        return PlainTextResponse("there is no such page", 404)
    return None


async def _body(receive: Receive, most: int) -> bytes | None:
    """The whole body, or None for one that is larger than `most`."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        size += len(message.get("body", b""))
        if size > most:
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once more, then what the client sends."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _holds_address(body: bytes) -> bool:
    """Whether JSON names a file by an address, or is none. A file's own `url` is Gradio's."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return True
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path, url = value.get("path"), value.get("url")
            if isinstance(path, str) and _ADDRESS.match(path):
                return True
            if isinstance(url, str) and url.lstrip().lower().startswith("data:"):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
