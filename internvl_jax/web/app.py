"""The page as an ASGI application."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import fastapi
import gradio as gr
from starlette.middleware import Middleware

from internvl_jax.server.requests import Limits
from internvl_jax.web import page
from internvl_jax.web.guard import Guard

_SESSIONS = 200  # conversations kept, the latest ones


def create(tabs: list[Any], offered: list[str], limits: Limits) -> fastapi.FastAPI:
    """The application. Uploads lie in the folder that `private_folder` made."""
    blocks = page.build(tabs, offered)
    blocks.queue(max_size=limits.requests, api_open=False)
    blocks.state_session_capacity = _SESSIONS
    app = fastapi.FastAPI(
        openapi_url=None, middleware=[Middleware(Guard, limits=limits)]
    )
    return gr.mount_gradio_app(
        app, blocks, path="/", theme=page.THEME, css=page.CSS, max_file_size=limits.upload_bytes,
        allowed_paths=[], show_error=False, footer_links=[], run_history=False, ssr_mode=False,
        mcp_server=False, pwa=False,
    )  # fmt: skip


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """A folder for the page's own pictures, beside one for uploads; both are gone afterwards.

    Gradio looks for the latter when a page is built.
    """
    with tempfile.TemporaryDirectory(prefix="internvl-web-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(folder, "uploads")
        own = os.path.join(folder, "own")
        os.makedirs(own)
        yield own
