"""Pictures: those that visitors upload, read within limits, and those that the page offers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

from internvl_jax.data import image, scenes, text
from internvl_jax.loading import Model
from internvl_jax.server import requests
from internvl_jax.server.requests import Limits

# Held-out scenes of one object, and of two.
EXAMPLES = (("test_single", 2), ("test_single", 22), ("test_single", 31), ("test", 6), ("test", 9))
_SIDE = 256


def read(path: str | None, limits: Limits) -> Image.Image:
    """The picture at the path of an upload, turned as the visitor sees it.

    Raises ValueError where none was chosen, ApiError for a file that is too large or no picture.
    """
    if path is None:
        raise ValueError("choose a picture first")
    return ImageOps.exif_transpose(requests.decoded(Path(path).read_bytes(), limits))


def pixels(model: Model, picture: Image.Image) -> np.ndarray:
    """uint8 [1, S, S, 3] as the vision tower takes it."""
    size = getattr(model.config, "input_size", None) or model.config.vit.image_size
    return image.square(picture, size)[None]


def examples(folder: str | os.PathLike) -> list[str]:
    """Paths of pictures of the embedded data in a folder, named after what they show."""
    paths = []
    for place in EXAMPLES:
        scene = scenes.scene(*place)
        caption = text.scene_captions(scene.description, "en")[0]
        paths.append(str(Path(folder) / f"{caption}.png"))
        Image.fromarray(scenes.render([scene], _SIDE)[0]).save(paths[-1])
    return paths


def buttons(choices: Sequence[tuple[str, str | None, Any]], target: Any) -> None:
    """A row of buttons (words, path of an icon, value), each of which gives `target` its value."""
    gr.Markdown("Or take one of these:")
    with gr.Row(elem_classes="choices"):
        for words, icon, value in choices:
            button = gr.Button(words, icon=icon, size="sm", min_width=120)
            button.click(
                lambda value=value: value, None, target, api_visibility="private",
                show_progress="hidden",
            )  # fmt: skip


def chooser(offered: Sequence[str], height: int = 300) -> gr.Image:
    """A place for a picture, with the offered ones under it; gives functions the file's path."""
    chosen = gr.Image(
        offered[0],
        label="Picture",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        buttons=[],
        height=height,
        interactive=True,
        alt_text="The picture that you chose",
    )
    # Gradio's own would open a stranger's file with every decoder there is; `read` does not.
    chosen.preprocess = lambda payload: None if payload is None else payload.path
    buttons([(Path(path).stem, path, path) for path in offered], chosen)
    return chosen
