"""An HTML page of a batch as the model sees it: crops and tiles, tokens, and where loss falls."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from internvl_jax.data import conversation
from internvl_jax.data.tokenizer import Tokenizer

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
.example { border-top: 1px solid #8886; padding: 1rem 0; display: flex; gap: 1.5rem;
  flex-wrap: wrap; }
.images { display: flex; flex-wrap: wrap; gap: 4px; align-content: flex-start; width: 19rem; }
.images img { width: 9rem; height: 9rem; object-fit: contain; image-rendering: pixelated; }
.images img:only-child { width: 18.5rem; height: 18.5rem; }
.texts { flex: 1 1 26rem; min-width: 0; } .field { margin: 0 0 .8rem; overflow-wrap: anywhere; }
.name { font-size: .8rem; opacity: .75; display: block; }
.token { padding: 0 1px; border-radius: 2px; background: #8882; margin-right: 1px; }
.token.learnt { background: #2a6f3a; color: #fff; }
.token.image { background: #35507a; color: #fff; }
"""


def page(
    batch: Mapping[str, np.ndarray],
    ids: Sequence[str],
    places: Sequence[str],
    tokenizer: Tokenizer,
    title: str,
) -> str:
    """The page. ids, places: of the records that the rows hold."""
    rows = "\n".join(
        _example({name: array[row] for name, array in batch.items()}, *about, tokenizer)
        for row, about in enumerate(zip(ids, places, strict=True))
    )
    learns = "caption_labels" in batch or "labels" in batch
    legend = (
        '<p><span class="token learnt">green</span> tokens are learnt: loss falls on them. '
        '<span class="token image">blue</span> ones stand for the image.</p>'
        if learns
        else ""
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>{legend}\n{rows}\n</html>\n"
    )


def _example(example, number, place, tokenizer):
    images = ""
    if "image" in example:
        pixels = example["image"]
        squares = pixels[None] if pixels.ndim == 3 else pixels
        shown = [_image(square, n) for n, square in enumerate(squares) if square.any() or n == 0]
        images = f'<div class="images">{"".join(shown)}</div>'
    fields = "".join(
        _field(name, value, _labels_of(name, example), tokenizer, example.get("segments"))
        for name, value in example.items()
        if name not in ("image", "segments") and "labels" not in name
    )
    heading = html.escape(f"{number}  {place}")
    return (
        f'<section class="example">{images}<div class="texts"><h2>{heading}</h2>{fields}</div>'
        "</section>"
    )


def _labels_of(name, example):
    return example.get("labels" if name == "tokens" else f"{name}_labels")


def _image(pixels, number):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    alt = f"image {number + 1}, {pixels.shape[1]} × {pixels.shape[0]} pixels"
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def _field(name, value, labels, tokenizer, segments=None):
    if value.ndim == 0:
        return f'<div class="field"><span class="name">{name}</span>{value}</div>'
    spans, images = [], 0
    end = int(np.flatnonzero(value)[-1]) + 1 if value.any() else 0
    for position in range(end + 1):
        token = int(value[position]) if position < end else 0
        if position < end and token == conversation.IMAGE_TOKEN:
            images += 1
            continue
        if images:
            spans.append(f'<span class="token image">image × {images}</span>')
            images = 0
        if position == end:
            break
        if segments is not None and position and segments[position] != segments[position - 1]:
            spans.append("<hr>")  # the next conversation of a packed row
        learnt = labels is not None and labels[position] != conversation.IGNORE
        piece = html.escape(tokenizer.pieces([token])[0].replace("▁", " ") or " ")
        shown = piece.replace("<0x0A>", "⏎") or "·"
        spans.append(
            f'<span class="token{" learnt" if learnt else ""}" title="{token}">{shown}</span>'
        )
    count = f"{end} of {len(value)} tokens"
    return (
        f'<div class="field"><span class="name">{name}, {count}</span>{"".join(spans)}</div>'
    )
