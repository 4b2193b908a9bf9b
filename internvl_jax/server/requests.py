"""Requests of the OpenAI API as checked values. Nothing here is fetched, trusted or unbounded.

Every refusal is an `ApiError` with a 4xx status. Text of users never becomes an image position or
a special token; images come as data URLs only, so the server opens no connection for anybody.
"""

import base64
import binascii
import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.data import image
from internvl_jax.data.conversation import IMAGE_MARK
from internvl_jax.serving import Sampling

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_MOST_CHARACTERS = 16  # of a token, for a first look at the length of a text
_UNSUPPORTED = {  # field → the values that ask for nothing
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}


class ApiError(Exception):
    """A request that is refused: HTTP status, message, and the field that is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many there may be.

    upload_bytes: of a request's body. pixels: of an image, checked before it is decoded. images:
    of a request. prompt_tokens: of a chat, image positions included. new_tokens: of an answer.
    inputs: of an embeddings request. requests: in work or waiting; what comes beyond is answered
    429. batch: rows that run together. body_seconds: in which a body has to arrive.
    """

    upload_bytes: int = 10 << 20
    pixels: int = 25_000_000
    images: int = 4
    prompt_tokens: int = 4096
    new_tokens: int = 512
    inputs: int = 64
    requests: int = 64
    batch: int = 8
    body_seconds: float = 30.0


@dataclass(frozen=True)
class ChatRequest:
    """Rounds of (question, answer) as `Model.chat_prompt` takes them, their images, settings."""

    model: str
    rounds: list[tuple[str, str | None]]
    images: list[Image.Image]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    usage_in_stream: bool


@dataclass(frozen=True)
class EmbeddingsRequest:
    """Texts and pictures to embed, in order; mode is "c", "g" or None for the model's best."""

    model: str
    inputs: list[str | Image.Image]
    mode: str | None
    dimensions: int | None
    as_base64: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """The body's JSON object."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def chat_request(body: dict[str, Any], limits: Limits) -> ChatRequest:
    """A request to /v1/chat/completions."""
    for field, harmless in _UNSUPPORTED.items():
        if body.get(field) not in harmless:
            raise ApiError(400, f"{field} is not supported", field)
    name = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    max_tokens = _integer(body, name, limits.new_tokens, 1, limits.new_tokens)
    sampling = Sampling(
        temperature=_number(body, "temperature", 0.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        seed=_integer(body, "seed", 0, -(2**63), 2**63) & 0xFFFFFFFF,
    )
    rounds, images = _conversation(body.get("messages"), limits)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", "stream_options")
    return ChatRequest(
        model=_model(body),
        rounds=rounds,
        images=images,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=_stop(body.get("stop")),
        stream=body.get("stream") is True,
        usage_in_stream=options.get("include_usage") is True,
    )


def embeddings_request(body: dict[str, Any], limits: Limits) -> EmbeddingsRequest:
    """A request to /v1/embeddings; an input that starts with "data:" is an image."""
    model, inputs = _model(body), body.get("input")
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list) or not inputs:
        raise ApiError(400, "input must be a text or a list of texts and images", "input")
    if len(inputs) > limits.inputs:
        raise ApiError(400, f"input may have {limits.inputs} entries, not {len(inputs)}", "input")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise ApiError(400, "encoding_format must be float or base64", "encoding_format")
    if body.get("mode") not in (None, "c", "g"):
        raise ApiError(400, "mode must be c or g", "mode")
    dimensions = body.get("dimensions")
    if dimensions is not None:
        dimensions = _integer(body, "dimensions", 0, 1, 2**31)
    texts = sum(len(x) for x in inputs if isinstance(x, str) and not x.startswith("data:"))
    if texts > limits.prompt_tokens * _MOST_CHARACTERS:
        raise ApiError(400, "the texts are too long", "input")
    if sum(isinstance(x, str) and x.startswith("data:") for x in inputs) > limits.images:
        raise ApiError(400, f"at most {limits.images} images are allowed", "input")
    values = [
        picture(x, limits) if isinstance(x, str) and x.startswith("data:") else _text(x, "input")
        for x in inputs
    ]
    if not all(isinstance(value, Image.Image) or value.strip() for value in values):
        raise ApiError(400, "input has an empty text", "input")
    base64_asked = body.get("encoding_format") == "base64"
    return EmbeddingsRequest(model, values, body.get("mode"), dimensions, base64_asked)


def picture(url: Any, limits: Limits) -> Image.Image:
    """The image in a data URL. Any other URL is refused: nothing is fetched for a client."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ApiError(
            400, "images come as data URLs (data:image/png;base64,…); nothing is fetched", "url"
        )
    head, comma, data = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ApiError(400, "a data URL of an image is data:image/<type>;base64,<data>", "url")
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the data URL is not valid base64", "url") from None
    return decoded(raw, limits)


def decoded(raw: bytes, limits: Limits) -> Image.Image:
    """The RGB image in the bytes of a stranger's file, its size checked before it is decoded."""
    try:
        # Only these decoders look at a stranger's bytes.
        with Image.open(io.BytesIO(raw), formats=FORMATS) as header:
            width, height = header.size
    except Exception:  # a decoder may fail in any way on hostile bytes
        names = ", ".join(FORMATS)
        raise ApiError(400, f"the data is not an image; known are {names}", "url") from None
    if width * height > limits.pixels:
        message = f"the image has {width} x {height} pixels; {limits.pixels} are allowed"
        raise ApiError(413, message, "url")
    try:
        return image.read(io.BytesIO(raw), limits.pixels)
    except Exception:  # likewise
        raise ApiError(400, "the image is damaged", "url") from None


def _conversation(
    messages: Any, limits: Limits
) -> tuple[list[tuple[str, str | None]], list[Image.Image]]:
    """Rounds and images of a list of messages; instructions go before the first question."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of messages, not an empty one", "messages")
    if len(messages) > limits.prompt_tokens:
        raise ApiError(400, "there are too many messages", "messages")
    rounds: list[tuple[str, str | None]] = []
    waiting: list[str] = []  # the parts of the question that is being asked
    images: list[Image.Image] = []
    length = 0
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(400, "a message needs a role: system, user or assistant", "messages")
        text, urls = _content(message.get("content"))
        length += len(text)
        if length > limits.prompt_tokens * _MOST_CHARACTERS:
            raise ApiError(400, "the conversation is too long", "messages")
        if urls and role != "user":
            raise ApiError(400, "only messages of the user may hold images", "messages")
        if len(images) + len(urls) > limits.images:
            raise ApiError(400, f"at most {limits.images} images are allowed", "messages")
        if role == "assistant":
            if not waiting:
                raise ApiError(400, "an answer needs a question before it", "messages")
            rounds.append(("\n".join(waiting), text))
            waiting = []
            continue
        images += [picture(url, limits) for url in urls]
        waiting += [IMAGE_MARK] * len(urls) + ([text] if text else [])
    if not waiting or messages[-1].get("role") != "user":
        raise ApiError(400, "the last message must be the user's, and not empty", "messages")
    return [*rounds, ("\n".join(waiting), None)], images


def _content(content: Any) -> tuple[str, list[Any]]:
    """(text, URLs of images) of a message's content: a text, or a list of parts."""
    if isinstance(content, str):
        return _text(content, "messages"), []
    if not isinstance(content, list):
        raise ApiError(400, "content must be a text or a list of parts", "messages")
    texts, urls = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part.get("text"), "messages"))
        elif kind == "image_url":
            url = part.get("image_url")
            urls.append(url.get("url") if isinstance(url, dict) else url)
        else:
            raise ApiError(400, "a part has the type text or image_url", "messages")
    return "\n".join(texts), urls


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise ApiError(400, f"{param} must hold texts; token ids are not supported", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} holds half of a surrogate pair", param) from None
    if IMAGE_MARK in value:
        raise ApiError(400, f"a text may not hold {IMAGE_MARK!r}", param)
    return value


def _model(body: dict[str, Any]) -> str:
    if not isinstance(body.get("model"), str):
        raise ApiError(400, "model must name a model; see /v1/models", "model")
    return body["model"]


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > 4:
        raise ApiError(400, "stop is a text or a list of up to four", "stop")
    if not all(isinstance(stop, str) and 0 < len(stop) <= 100 for stop in stops):
        raise ApiError(400, "a stop has 1 to 100 characters", "stop")
    return tuple(stops)


def _number(body: dict[str, Any], field: str, default: float, low: float, high: float) -> float:
    value = default if body.get(field) is None else body[field]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ApiError(400, f"{field} must be a number", field)
    if not low <= value <= high or not math.isfinite(value):
        raise ApiError(400, f"{field} must lie between {low:g} and {high:g}", field)
    return float(value)


def _integer(body: dict[str, Any], field: str, default: int, low: int, high: int) -> int:
    value = default if body.get(field) is None else body[field]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ApiError(400, f"{field} must be a whole number", field)
    if not low <= value <= high:
        raise ApiError(400, f"{field} must lie between {low} and {high}", field)
    return value


def encoded(vector: np.ndarray, as_base64: bool) -> str | list[float]:
    """A feature as the API returns it: numbers, or the base64 of little-endian float32."""
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
