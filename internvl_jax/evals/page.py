"""A self-contained HTML page: a bar for each figure, and marks where the paper stands."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.evals.published import POINTS, PUBLISHED, percent
from internvl_jax.evals.results import notes

_WIDTH, _HEIGHT = 320, 18  # of a plot, in pixels
_COLORS = ("#c0392b", "#8e44ad")  # of the paper's models, in the order of their table
_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 64em; color: #222 }
h2 { margin: 2em 0 .3em } p { margin: .3em 0; color: #555 }
table { border-collapse: collapse } th { text-align: left; font-weight: 600 }
td, th { padding: 2px 14px 2px 0; white-space: nowrap } tr + tr { border-top: 1px solid #eee }
.n { text-align: right; font-variant-numeric: tabular-nums } svg { display: block }
"""


def write(
    path: Path, figures: Mapping[str, float], details: Mapping[str, Any], source: str
) -> None:
    """Write the page: a table for each evaluator, what must be said of its figures above it.

    figures: by their whole names. details: of the evaluators. source: of the model or answers.
    """
    groups: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        groups.setdefault(name.partition(".")[0], {})[name] = value
    title = f"Evaluation of {html.escape(source)}"
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>",
        "<p>In per cent, MME in points. Marks are the paper's numbers (arXiv 2312.14238); what "
        "follows its model is ours minus its number.</p>",
    ]
    for evaluator, part in groups.items():
        parts.append(f"<h2>{html.escape(evaluator)}</h2>")
        parts += [f"<p>{html.escape(note)}</p>" for note in notes(details.get(evaluator, {}))]
        rows = "".join(_row(name, value) for name, value in part.items())
        head = "<tr><th>figure</th><th class=n>ours</th><th>{}</th><th>paper</th></tr>"
        parts.append(f"<table>{head.format(_axis())}{rows}</table>")
    path.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")


def _full(name: str, shown: float, paper: Mapping[str, float]) -> float:
    """The figure at the right end of a plot."""
    if name.startswith(POINTS):
        total = 2000 if name.endswith(".total") else 200  # two hundred of each of ten tasks
        return max(total, shown)
    # CIDEr may be above 100: its plot ends at the next hundred.
    return 100.0 * max(1, -(-max(shown, *paper.values(), 0.0) // 100))


def _row(name: str, value: float) -> str:
    shown, paper = percent(name, value), PUBLISHED.get(name, {})
    full = _full(name, shown, paper)
    scale = _WIDTH / full
    marks, words = [], []
    for color, (model, number) in zip(_COLORS, paper.items(), strict=False):
        model = html.escape(model)
        marks.append(
            f'<path d="M{number * scale:.1f} 0v{_HEIGHT}" stroke="{color}" stroke-width="2">'
            f"<title>{model} {number:g}</title></path>"
        )
        words.append(f'<span style="color:{color}">{model} {number:g}</span> {shown - number:+.1f}')
    label = html.escape(name.partition(".")[2])
    style = 'text-anchor="end" font-size="10" fill="#777"'
    end = "" if full == 100 else f'<text x="{_WIDTH - 2}" y="13" {style}>0–{full:g}</text>'
    return (
        f"<tr><td>{label}</td><td class=n>{shown:.2f}</td>"
        f'<td><svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{shown:.2f}">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#f3f5f7"/>'
        f'<rect y="3" width="{max(shown, 0) * scale:.1f}" height="{_HEIGHT - 6}" fill="#5b8db8"/>'
        f"{end}{''.join(marks)}</svg></td><td>{', '.join(words)}</td></tr>"
    )


def _axis() -> str:
    """The scale above the bars of per cent."""
    ticks = [(0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end")]
    texts = "".join(
        f'<text x="{x * _WIDTH / 100:g}" y="11" text-anchor="{anchor}">{x}</text>'
        for x, anchor in ticks
    )
    style = 'font-size="10" font-weight="400" fill="#777"'
    return f'<svg width="{_WIDTH}" height="14" {style}>{texts}</svg>'
