"""Requests that the page has no use for are refused before Gradio sees them."""

import http.client
import json
import socket
import threading
import time

import gradio as gr
import pytest
import uvicorn

from internvl_jax.server.requests import Limits
from internvl_jax.web import app
from internvl_jax.web.guard import HEADERS

LIMITS = Limits(upload_bytes=200_000, requests=8, body_seconds=5.0)
API = "/gradio_api"


class Tab:
    """A tab with a picture and nothing behind it."""

    TITLE = "Only"

    def missing(self):
        return None

    def build(self, _offered):
        gr.Button("Show").click(lambda path: str(path), gr.Image(type="filepath"), gr.Textbox())


@pytest.fixture(scope="module")
def port():
    """A free port at which the application listens."""
    with app.private_folder():
        config = uvicorn.Config(
            app.create([Tab()], [], LIMITS), host="127.0.0.1", port=0, log_level="error"
        )
        listening = config.bind_socket()
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def upload(port, name, data):
    body = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode() + data + b"\r\n--x--\r\n"  # fmt: skip
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    return ask(port, "POST", f"{API}/upload", body, head)


def join(port, value):
    body = json.dumps({"data": [value], "fn_index": 0, "session_hash": "s"}).encode()
    return ask(port, "POST", f"{API}/queue/join", body, {"Content-Type": "application/json"})


def test_the_page_is_served_and_names_no_other_place_to_load_from(port):
    status, body, headers = ask(port, "GET", "/")
    assert status == 200 and b"InternVL" in body
    lower = {name.lower(): value for name, value in headers.items()}
    assert all(lower[name.lower()] == value for name, value in HEADERS.items())
    assert "default-src 'self'" in lower["content-security-policy"]
    assert "http" not in lower["content-security-policy"]
    config = json.loads(ask(port, "GET", "/config")[1])
    assert config["analytics_enabled"] is False and config["title"] == "InternVL"


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", f"{API}/proxy=http://127.0.0.1/"),
        ("GET", f"{API}/file=http://127.0.0.1/a.png"),
        ("GET", f"{API}/file=https://example.com/a.png"),
        ("GET", f"{API}/info"),
        ("GET", f"{API}/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/monitoring"),
        ("GET", "/login"),
        ("POST", f"{API}/run/predict"),
        ("POST", f"{API}/call/predict"),
        ("POST", f"{API}/component_server"),
        ("POST", f"{API}/vibe-edit"),
        ("POST", f"{API}/process_recording"),
        ("POST", "/login"),
        ("PUT", "/"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(port, method, path):
    assert ask(port, method, path)[0] in (404, 405)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "//etc/passwd", "/../etc/passwd", "/proc/self/environ", __file__]
)
def test_files_of_the_machine_are_not_served(port, path):
    status, body, _ = ask(port, "GET", f"{API}/file={path}")
    assert status in (403, 404) and b"root:" not in body
    code, _, _ = join(port, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert code == (400 if path.startswith("//") else 200)
    if code == 400:
        return
    status, body, _ = ask(port, "GET", f"{API}/queue/data?session_hash=s")
    assert status == 200 and b'"success":false' in body.replace(b" ", b"")
    assert b"root:" not in body and b"passwd" not in body


def test_no_address_is_fetched(port):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        meta = {"_type": "gradio.FileData"}
        for value in (
            {"path": address, "meta": meta},
            {"path": "https://example.com/a.png", "meta": meta},
            {"path": f" {address}", "meta": meta},
            {"path": f"//{address}", "meta": meta},
            {"path": "a.png", "url": "data:image/png;base64,AAAA", "meta": meta},
            [{"deep": [{"path": address}]}],
        ):
            assert join(port, value)[0] == 400
        with pytest.raises(TimeoutError):
            listener.accept()


def test_bodies_are_small(port):
    assert upload(port, "a.png", b"0" * 100_000)[0] == 200
    assert upload(port, "a.png", b"0" * 300_000)[0] == 413
    assert join(port, "w" * (2 << 20))[0] == 413
    for body in (b"", b"{", b"[" * 100_000, b"\xff"):
        assert ask(port, "POST", f"{API}/queue/join", body)[0] == 400


def test_bodies_that_never_come_are_given_up_and_keep_nobody_else_out_for_long(port):
    slow = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(9)]
    for one in slow:
        one.sendall(
            f"POST {API}/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
    codes = sorted(one.recv(4096).split(b" ", 2)[1] for one in slow)
    assert codes == [b"408"] * 8 + [b"429"]
    for one in slow:
        one.close()
    assert upload(port, "a.png", b"0")[0] == 200


def test_what_was_uploaded_never_runs_in_the_browser(port):
    """A page or a drawing comes back as a download."""
    for name in ("a.html", "a.svg"):
        (path,) = json.loads(upload(port, name, b"<script>alert(1)</script>")[1])
        status, _, headers = ask(port, "GET", f"{API}/file={path}")
        lower = {key.lower(): value for key, value in headers.items()}
        assert status == 200 and lower["content-disposition"].startswith("attachment")
