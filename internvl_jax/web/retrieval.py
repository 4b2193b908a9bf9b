"""Retrieval: the pictures of a gallery that fit a text best."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from internvl_jax.data import conversation, image, scenes, text
from internvl_jax.evals import features
from internvl_jax.evals.retrieval import distinct_scenes
from internvl_jax.loading import Model
from internvl_jax.web import pictures
from internvl_jax.web.site import Site, notice, on, text_length

log = logging.getLogger(__name__)
ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
QUERIES = (
    "a large yellow star", "a red circle above a blue square", "一个蓝色的圆环", "하얀 십자가",
    "un triángulo negro",
)  # fmt: skip
MOST_CHARACTERS = 1000
_SCENES, _SIDE, _SHOWN, _TEXTS, _IMAGES = 120, 224, 12, 32, 32


@dataclass(frozen=True)
class Gallery:
    """Pictures to search in: names, what opens one by its number, and unit features [N, E]."""

    names: Sequence[str]
    open: Callable[[int], Image.Image]
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def _embed(model: Model, rows: np.ndarray) -> np.ndarray:
    """Unit features [N, E] of squares, by the model's best way of looking."""
    mode = "g" if model.config.num_queries else "c"
    return features.image_features(model.config, model.params, rows, mode, _IMAGES)


def embedded(model: Model) -> Gallery:
    """Held-out scenes of the embedded data, named by their captions."""
    chosen = distinct_scenes(_SCENES)
    names = [text.scene_captions(scene.description, "en")[0] for scene in chosen]
    shown = scenes.render(chosen, _SIDE)
    size = model.config.vit.image_size
    rows = np.stack([image.square(Image.fromarray(picture), size) for picture in shown])
    return Gallery(names, lambda number: Image.fromarray(shown[number]), _embed(model, rows))


def of_folder(model: Model, folder: str) -> Gallery:
    """The pictures in a folder and the folders in it; those that cannot be read are left out.

    Raises ValueError where there is no picture.
    """
    root, size = Path(folder), model.config.vit.image_size
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    kept, parts = [], []
    for start in range(0, len(paths), _IMAGES):
        rows = []
        for path in paths[start : start + _IMAGES]:
            try:
                rows.append(image.square(image.read(path), size))
                kept.append(path)
            except (OSError, ValueError) as error:
                log.warning("left out of the gallery: %s", error)
        if rows:
            parts.append(_embed(model, np.stack(rows)))
    if not kept:
        raise ValueError(f"there is no picture in {folder}")

    def opened(number: int) -> Image.Image:
        picture = image.read(kept[number])
        picture.thumbnail((2 * _SIDE, 2 * _SIDE))
        return picture

    return Gallery([str(path.relative_to(root)) for path in kept], opened, np.concatenate(parts))


def search(model: Model, gallery: Gallery, query: str, count: int) -> list[tuple[int, float]]:
    """(number in the gallery, cosine) of the `count` pictures that fit a text best."""
    query = query.strip()
    if not query:
        raise ValueError("write what you are looking for")
    if len(query) > MOST_CHARACTERS:
        raise ValueError(f"a text has at most {MOST_CHARACTERS} characters")
    ids = model.tokenizer.encode_batch([conversation.contrastive_text(query)], text_length(model))
    (row,) = features.text_features(model.config, model.params, ids, _TEXTS)
    cosines = gallery.features @ row
    best = np.argsort(-cosines, kind="stable")[:count]
    return [(int(number), float(cosines[number])) for number in best]


class Tab:
    """The tab's layout."""

    TITLE = "Retrieval"

    def __init__(self, site: Site):
        self._site, self._model = site, site.internvl
        self._gallery: Gallery | None = None

    def missing(self) -> str | None:
        """Why the tab cannot be served, or None."""
        return self._site.without_texts("Retrieval")

    def warm(self, _offered: Sequence[str]) -> None:
        """Embed the gallery, and compile what a click runs."""
        folder = self._site.gallery
        self._gallery = embedded(self._model) if folder is None else of_folder(self._model, folder)
        self._run(QUERIES[0])

    def build(self, _offered: Sequence[str]) -> None:
        """Lay the tab out."""
        what = "pictures of your folder" if self._site.gallery else "held-out scenes"
        gr.Markdown(
            f"Search {len(self._gallery)} {what} with words, in any language. The best comes "
            "first, with the cosine of picture and text."
        )
        with gr.Row(equal_height=True):
            query = gr.Textbox(QUERIES[0], label="What are you looking for?", scale=5)
            button = gr.Button("Search", variant="primary", scale=1)
        pictures.buttons([(words, None, words) for words in QUERIES], query)
        said = notice()
        found = gr.Gallery(
            self._run(QUERIES[0])[0], label="Pictures found", show_label=False,
            columns=4, height=620, object_fit="contain", buttons=[], interactive=False,
        )  # fmt: skip
        for event in (button.click, query.submit):
            on(event, self._run, [query], [found], said)

    def _run(self, query: str) -> tuple[list[tuple[Image.Image, str]]]:
        hits = search(self._model, self._gallery, query, _SHOWN)
        shown = [
            (self._gallery.open(number), f"{rank}. {self._gallery.names[number]} ({cosine:.2f})")
            for rank, (number, cosine) in enumerate(hits, 1)
        ]
        return (shown,)
