"""Images of the report as data URIs, and its charts as inline SVG.

The charts take their colours from the page's style sheet (classes `s0`, `s1`, … and
`currentColor`), so they follow its light and dark mode; series also differ in dashes.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 36
_CELL, _LABELS = 13, 118


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] → a PNG as "data:image/png;base64,…"."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def heat(
    pixels: np.ndarray, weights: np.ndarray, size: tuple[int, int] = (96, 96)
) -> np.ndarray:
    """An image [H, W, 3] in grey with weights [G, G] as warm colours, uint8 [height, width, 3].

    size: (width, height). The scale is each map's own: its largest weight shines, its smallest
    stays grey.
    """
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BICUBIC)
    spread = np.ptp(weights)
    level = (weights - weights.min()) / (spread if spread > 0 else 1.0)
    mask = Image.fromarray(np.rint(255 * level).astype(np.uint8))
    strength = np.asarray(mask.resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    base = np.asarray(grey, np.float32)[..., None] * 0.75 * np.ones(3, np.float32)
    # From transparent over red to yellow.
    colour = np.concatenate(
        [np.full_like(strength, 255), 235 * strength**1.5, 40 * np.ones_like(strength)], axis=-1
    )
    mixed = base + (colour - base) * (0.85 * np.clip(strength, 0, 1))
    return np.rint(np.clip(mixed, 0, 255)).astype(np.uint8)


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Markup:
    """Lines of (step, value) points over a common axis from 0, or from below where values are."""
    points = [p for line in series.values() for p in line if math.isfinite(p[1])]
    if not points:
        return Markup("<p>No values were recorded.</p>")
    ticks = _ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    low, high = ticks[0], ticks[-1]
    last = max(x for x, _ in points) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / last * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    bottom = _HEIGHT - _BOTTOM + 16
    for step in (0, last / 2, last):
        anchor = "end" if step == last else "middle"
        parts.append(
            f'<text x="{place(step, low)[0]}" y="{bottom}" text-anchor="{anchor}">{step:.0f}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" '
        'text-anchor="middle">step</text>'
    )
    for number, line in enumerate(series.values()):
        path = " ".join(f"{x},{y}" for x, y in (place(*p) for p in line if math.isfinite(p[1])))
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
    ends = ", ".join(
        f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items()
    )
    label = escape(f"{title}: {ends}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that span [low, high], three to six of them."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def confusion_matrix(counts: np.ndarray, names: Sequence[str], marked: set[int]) -> Markup:
    """Counts [C, C] (rows the truth) as shaded cells; `marked` classes get a dagger."""
    totals = np.maximum(counts.sum(axis=1), 1)
    size = _LABELS + _CELL * len(names) + 2
    parts = []
    for i, name in enumerate(names):
        text = escape(f"{name} †" if i in marked else name)
        kind = ' class="marked"' if i in marked else ""
        middle = _LABELS + _CELL * (i + 0.5) + 3.5
        parts.append(f'<text{kind} x="{_LABELS - 5}" y="{middle}" text-anchor="end">{text}</text>')
        parts.append(
            f'<text{kind} transform="translate({middle},{_LABELS - 5}) rotate(-90)">{text}</text>'
        )
        corner = _LABELS + _CELL * i
        parts.append(
            f'<rect class="diagonal" x="{corner}" y="{corner}" width="{_CELL}" height="{_CELL}"/>'
        )
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = counts[row, column] / totals[row]
        kind = "right" if row == column else "wrong"
        title = escape(
            f"{names[row]} taken for {names[column]}: {counts[row, column]} of {totals[row]}"
        )
        parts.append(
            f'<rect class="{kind}" x="{_LABELS + _CELL * column}" y="{_LABELS + _CELL * row}" '
            f'width="{_CELL}" height="{_CELL}" fill-opacity="{0.15 + 0.85 * share:.2f}">'
            f"<title>{title}</title></rect>"
        )
    return Markup(
        f'<svg class="matrix" viewBox="0 0 {size} {size}" width="{size}" role="img" '
        'aria-label="Confusion matrix; the table below lists its largest confusions">'
        + "".join(parts)
        + "</svg>"
    )
