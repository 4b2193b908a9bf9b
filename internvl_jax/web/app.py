"""The page as an ASGI application."""

import os
import tempfile
from typing import Any

import fastapi
import gradio as gr
from starlette.middleware import Middleware

from internvl_jax.server.requests import Limits
from internvl_jax.web import page
from internvl_jax.web.guard import Guard
from internvl_jax.web.site import Site

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


def private_folder() -> tempfile.TemporaryDirectory:
    """A folder for uploads, gone when the program ends. Call it before anything is built."""
    folder = tempfile.TemporaryDirectory(prefix="internvl-web-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return folder


__all__ = ["Site", "create", "private_folder"]
