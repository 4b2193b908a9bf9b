"""A server of small random models in a thread, reached through real sockets."""

import contextlib
import threading
import time
from types import SimpleNamespace

import jax
import pytest
import uvicorn

from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.loading import Model
from internvl_jax.models import create, from_dict
from internvl_jax.server.app import Server
from internvl_jax.server.requests import Limits

LIMITS = Limits(
    upload_bytes=400_000, pixels=1_000_000, images=2, prompt_tokens=200, new_tokens=12, requests=16,
    batch=4, body_seconds=1.0,
)


def _model(number, **fields):
    config = from_dict({"size": "tiny", **fields})
    params = create(config, jax.random.key(number))
    return Model(config, params, Tokenizer(), {"data": {"template": "brief", "text_length": 48}})


@contextlib.contextmanager
def running(models, limits):
    """Serves on a free port of the loopback address; yields the base URL."""
    config = uvicorn.Config(
        Server(models, limits).app, host="127.0.0.1", port=0, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served():
    """(url, models, limits) of a running server."""
    models = {"chat": _model(0, family="chat"), "g": _model(1, family="internvl")}
    with running(models, LIMITS) as url:
        yield SimpleNamespace(url=url, models=models, limits=LIMITS)
