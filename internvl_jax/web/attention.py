"""Attention maps: where the middleware's queries and the tower's class token look."""

import functools

import gradio as gr
import numpy as np
from PIL import Image

from internvl_jax.demo.pictures import heat
from internvl_jax.evals import attention
from internvl_jax.models import InternVLConfig
from internvl_jax.web import pictures
from internvl_jax.web.site import Site, notice, on

QUERIES, CLASS_TOKEN = "queries", "class token"
_SIDE = 480
_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "centre", "right")


def query_map(maps: np.ndarray, query: int) -> np.ndarray:
    """[G, G] of one of the queries' maps [Q, G, G], counted from 1; 0 is the mean of all."""
    return maps[query - 1] if query else maps.mean(axis=0)


def class_token_map(maps: np.ndarray, layer: int, head: int) -> np.ndarray:
    """[G, G] of a layer and a head of maps [depth, H, G, G], both counted from 1; head 0: mean."""
    heads = maps[layer - 1]
    return heads[head - 1] if head else heads.mean(axis=0)


def overlay(picture: Image.Image, weights: np.ndarray) -> np.ndarray:
    """The picture in grey with the map over it, in the picture's own aspect: uint8 [H, W, 3]."""
    scale = _SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return heat(np.asarray(picture), weights, size)


def told(weights: np.ndarray) -> str:
    """In words, for those who do not see the map: which ninth of the picture gets most."""
    grid = len(weights)
    thirds = np.arange(grid) * 3 // grid
    shares = np.zeros((3, 3))
    np.add.at(shares, (thirds[:, None], thirds[None, :]), weights)
    total = weights.sum()
    row, column = np.unravel_index(np.argmax(shares), shares.shape)
    place = f"{_ROWS[row]} {_COLUMNS[column]}" if (row, column) != (1, 1) else "middle"
    share = shares[row, column] / max(total, 1e-12)
    return (
        f"{total:.0%} of the attention goes to the picture's patches. The {place} ninth of the "
        f"picture gets most of that, {share:.0%}."
    )


class Tab:
    """The tab's layout."""

    TITLE = "Attention"

    def __init__(self, site: Site):
        self._site, self._model = site, site.internvl or site.chat
        self._first: tuple[np.ndarray | None, str] = (None, "")  # shown before a click
        # Moving a slider computes nothing: the maps of the last pictures are kept.
        self._maps = functools.lru_cache(maxsize=8)(self._compute)

    def missing(self) -> str | None:
        """Why the tab cannot be served, or None."""
        return None if self._model is not None else "No model is loaded."

    def warm(self, offered: list[str]) -> None:
        """Compile what a click runs."""
        runs = [self._run(offered[0], kind, 0, self._model.config.vit.depth, 0)
                for kind in self._kinds()]  # fmt: skip
        self._first = runs[0]

    def build(self, offered: list[str]) -> None:
        """Lay the tab out."""
        gr.Markdown(
            "Which patches of the picture a query of the middleware attends to (mean over heads "
            "and layers), or the class token of the vision tower in one layer and head."
        )
        kinds, vit = self._kinds(), self._model.config.vit
        first = kinds[0] == QUERIES
        with gr.Row():
            with gr.Column():
                picture = pictures.chooser(offered)
            with gr.Column():
                kind = gr.Radio(
                    [(k.capitalize(), k) for k in kinds], value=kinds[0], label="Of the"
                )
                most = getattr(self._model.config, "num_queries", 0)
                query = gr.Slider(
                    0, max(most, 1), 0, step=1, label="Query (0: the mean of all)", visible=first
                )
                layer = gr.Slider(
                    1, vit.depth, vit.depth, step=1, label="Layer", visible=not first
                )
                head = gr.Slider(
                    0, vit.num_heads, 0, step=1, label="Head (0: the mean of all)",
                    visible=not first,
                )  # fmt: skip
                button = gr.Button("Show attention", variant="primary")
                said = notice()
                shown = gr.Image(
                    self._first[0], label="Attention", buttons=[], interactive=False,
                    alt_text="The picture in grey, with what is attended to in yellow and red",
                )  # fmt: skip
                words = gr.Markdown(self._first[1], elem_id="attention-words")
        kind.change(
            lambda k: [gr.update(visible=v) for v in (k == QUERIES, *[k == CLASS_TOKEN] * 2)],
            kind, [query, layer, head], api_visibility="private",
        )  # fmt: skip
        settings = [picture, kind, query, layer, head]
        # A slider's `release` would leave the keyboard out.
        for event in (button.click, kind.input, *(s.input for s in (query, layer, head))):
            on(
                event, self._run, settings, [shown, words], said,
                show_progress="hidden", trigger_mode="always_last",
            )  # fmt: skip

    def _kinds(self) -> list[str]:
        config = self._model.config
        queries = isinstance(config, InternVLConfig) and config.num_queries
        return [QUERIES, CLASS_TOKEN] if queries else [CLASS_TOKEN]

    def _compute(self, kind: str, size: int, data: bytes) -> np.ndarray:
        pixels = np.frombuffer(data, np.uint8).reshape(1, size, size, 3)
        function = attention.attention_maps if kind == QUERIES else attention.class_token_maps
        return function(self._model.config, self._model.params, pixels, 1)[0]

    def _run(
        self, path: str | None, kind: str, query: float, layer: float, head: float
    ) -> tuple[np.ndarray, str]:
        picture = pictures.read(path, self._site.limits)
        pixels = pictures.pixels(self._model, picture)
        maps = self._maps(kind, pixels.shape[1], pixels.tobytes())
        if kind == QUERIES:
            weights = query_map(maps, int(query))
        else:
            weights = class_token_map(maps, int(layer), int(head))
        return overlay(picture, weights), told(weights)
