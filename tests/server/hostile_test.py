"""Malformed, oversized and hostile requests: all answered 4xx, with the server well afterwards."""

import asyncio
import base64
import http.client
import io
import json
import resource
import socket
import struct
import threading
import zlib
from urllib.parse import urlsplit

import pytest
from PIL import Image

CHAT, EMBED = "/v1/chat/completions", "/v1/embeddings"
HELLO = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def post(served, path, body, headers=None):
    """(status, parsed answer); `body` is bytes or a value to send as JSON."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request("POST", path, body, headers or {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def refused(served, path, body, status=400):
    code, answer = post(served, path, body)
    assert code == status, answer
    assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    return answer["error"]["message"]


def about(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return {**HELLO, "messages": [{"role": "user", "content": [part]}]}


def inline(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width, height, rows=b""):
    """A PNG file whose header claims a size, whatever its data hold."""

    def chunk(name, data):
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(kind):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def well_afterwards(served):
    yield
    code, answer = post(served, CHAT, HELLO)
    assert code == 200 and answer["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "//127.0.0.1/a",
        "/etc/passwd",
        " data:image/png;base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64,!!!!",
        "data:image/png;base64,é",
        "data:image/png;base64",
        None,
        {"url": "x"},
        7,
    ],
)
def test_no_address_is_fetched_and_no_other_url_taken(served, url):
    assert "data URL" in refused(served, CHAT, about(url))


def test_a_url_of_this_machine_is_never_connected_to(served):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        refused(served, CHAT, about(f"http://127.0.0.1:{port}/a.png"))
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        saved("JPEG")[:600],
        saved("PNG")[:600],
        saved("TIFF"),
        png(0, 5),
        png(64, 64),
        png(64, 64, b"\x09" * 5000),
        bytes(range(256)) * 20,
    ],
)
def test_what_is_not_an_image_is_refused(served, data):
    message = refused(served, CHAT, about(inline(data)))
    assert "not an image" in message or "damaged" in message
    refused(served, EMBED, {"model": "g", "input": inline(data)})


def test_decompression_bombs_are_refused_by_their_header(served):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bomb = png(20_000, 20_000, bytes(60_000_000))  # 1.2 GB of pixels
    for url in (inline(bomb), inline(png(2**31 - 1, 2**31 - 1)), inline(png(1_000_001, 1))):
        code, answer = post(served, CHAT, about(url))
        assert code in (400, 413) and answer["error"]["message"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10  # KiB; the test's own 60 MB are among them


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": "chat", "messages": 1' + b"0" * 5000 + b"}",
    ],
)
def test_malformed_bodies(served, body):
    for path in (CHAT, EMBED):
        refused(served, path, body)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": ["chat"]},
        {"messages": None},
        {"messages": []},
        {"messages": {}},
        {"messages": [None]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "robot", "content": "hello"}]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
        {"messages": [{"role": "user", "content": ["hello"]}]},
        {"messages": [{"role": "user", "content": "say <image>"}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "word " * 300}]},
        {"messages": [{"role": "user", "content": "w" * 10_000}]},
        {"messages": [{"role": "user", "content": ""}] * 300},
        {"messages": [*HELLO["messages"], {"role": "assistant", "content": "hi"}]},
        {"max_tokens": 0},
        {"max_tokens": 13},
        {"max_tokens": 10**30},
        {"max_tokens": "many"},
        {"max_tokens": True},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"seed": 1.5},
        {"stop": ["a"] * 5},
        {"stop": [""]},
        {"stop": 5},
        {"stream_options": 5},
        {"n": 1000},
        {"tools": [{}]},
        {"logit_bias": {"5": 100}},
    ],
)
def test_malformed_chats(served, change):
    refused(served, CHAT, {**HELLO, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"input": None},
        {"input": []},
        {"input": ""},
        {"input": [1, 2, 3]},
        {"input": [[1, 2]]},
        {"input": ["a"] * 65},
        {"input": ["word " * 5000]},
        {"input": ["\udfff"]},
        {"input": "data:image/png;base64,AAAA"},
        {"mode": "x"},
        {"dimensions": 3},
        {"encoding_format": "int1"},
    ],
)
def test_malformed_embeddings(served, change):
    refused(served, EMBED, {"model": "g", "input": "a star", **change})


def test_unknown_places_and_models(served):
    refused(served, "/v1/completions", {}, 404)
    refused(served, "/v1/models", {}, 405)
    refused(served, CHAT, {**HELLO, "model": "../../etc/passwd"}, 404)


def test_an_upload_that_is_too_large_is_refused(served):
    most = served.limits.upload_bytes
    refused(served, CHAT, b" " * (most + 1), 413)
    head = {"Transfer-Encoding": "chunked"}
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
    pieces = iter([b" " * 50_000] * 9)
    connection.request("POST", CHAT, pieces, head, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_never_comes_is_given_up(served):
    host = urlsplit(served.url)
    with socket.create_connection((host.hostname, host.port), timeout=30) as slow:
        slow.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


def test_clients_that_leave_free_their_places(served):
    host = urlsplit(served.url)
    body = json.dumps({**HELLO, "max_tokens": 12, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(4 * served.limits.requests):
        with socket.create_connection((host.hostname, host.port)) as leaving:
            leaving.sendall(head + body)
    for _ in range(200):
        code, _ = post(served, CHAT, HELLO)
        if code == 200:
            break
        threading.Event().wait(0.1)
    assert code == 200


def test_a_thousand_at_once_are_answered_200_or_429(served):
    host = urlsplit(served.url)
    body = json.dumps(HELLO).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    ).encode()

    async def one():
        reader, writer = await asyncio.open_connection(host.hostname, host.port)
        writer.write(head + body)
        answer = await reader.read()
        writer.close()
        return answer

    async def all_of_them():
        return await asyncio.gather(*(one() for _ in range(1000)))

    answers = asyncio.run(all_of_them())
    codes = [int(answer.split(b" ", 2)[1]) for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= served.limits.requests
    busy = next(answer for answer, code in zip(answers, codes, strict=True) if code == 429)
    assert b"retry-after: 1" in busy.lower() and b"rate_limit_error" in busy
