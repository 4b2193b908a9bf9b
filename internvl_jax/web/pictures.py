"""Pictures: those that visitors upload, read within limits, and those that the page offers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

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


def examples(folder: str | None = None) -> list[str]:
    """Paths of pictures of the embedded data, named after what they show, in a new folder."""
    folder = Path(folder or tempfile.mkdtemp(prefix="examples-"))
    paths = []
    for number, place in enumerate(EXAMPLES):
        scene = scenes.scene(*place)
        caption = text.scene_captions(scene.description, "en")[0]
        paths.append(str(folder / f"{number} {caption}.png"))
        Image.fromarray(scenes.render([scene], _SIDE)[0]).save(paths[-1])
    return paths


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
    gr.Examples(
        [[path] for path in offered],
        chosen,
        label="Or one of these",
        cache_examples=False,
        api_visibility="private",
    )
    return chosen
