"""The report of a small job: complete, self-contained, and safe against what it shows."""

import re

import numpy as np
import pytest

from internvl_jax.demo import pictures, report, targets

SECTIONS = ["results", "training", "retrieval", "confusion", "captions", "chat", "attention"]
SECTIONS += ["times"]


@pytest.fixture(scope="module")
def html(finished):
    workdir, _ = finished
    return (workdir / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_there_and_linked(html, section):
    assert f'<section id="{section}">' in html and f'href="#{section}"' in html


def test_nothing_comes_from_outside(html):
    assert not re.search(r"https?:|//cdn|<script|<link|url\(|@import", html)
    sources = re.findall(r'\bsrc="([^"]{0,40})', html)
    assert len(sources) > 50 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert len(html) < 3_000_000


def test_every_image_and_chart_says_what_it_shows(html, configs):
    images = re.findall(r"<img [^>]*>", html)
    assert images and all(re.search(r' alt="[^"]+"', image) for image in images)
    assert html.count('<svg class="chart"') == len(configs)
    charts = re.findall(r'<svg class="(?:chart|matrix)"[^>]*>', html)
    assert all('role="img"' in c and 'aria-label="' in c for c in charts)
    tables = re.findall(r"<table>.*?</table>", html, re.S)
    assert all("<caption>" in t and 'scope="col"' in t for t in tables)


def test_the_results_stand_beside_their_targets(html, finished):
    _, metrics = finished
    rows = targets.rows(metrics)
    assert [row.figure for row in rows] == list(targets.FIGURES)
    for row in rows:
        assert row.figure.title in html
        for value in row.values.values():
            assert row.figure.format(value) in html


def test_texts_of_a_model_cannot_break_the_page(tmp_path, configs):
    path = tmp_path / "report.html"
    answers = {
        "images": np.zeros((1, 8, 8, 3), np.uint8),
        "languages": ["en"],
        "questions": ["what is <this>?"],
        "kinds": ["what"],
        "answers": ["</dd><script>alert(1)</script>"],
        "expected": ["a & b"],
        "right": np.array([False]),
    }
    report.write(path, configs, {}, {"chat": answers}, {stage: [] for stage in configs}, {})
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html and "a &amp; b" in html
    assert 'id="retrieval"' not in html  # sections without content are left out


def test_axis_of_a_chart_spans_its_values():
    svg = pictures.line_chart({"loss": [(0, 6.3), (50, 2.0), (100, float("nan"))]}, "Loss")
    numbers = [float(n) for n in re.findall(r'text-anchor="end">([\d.]+)<', svg)]
    assert numbers[0] == 0 and max(numbers[:-1]) >= 6.3 and numbers[-1] == 50
    assert "nan" not in svg.split(">", 1)[1]


def test_heat_shines_where_the_weight_is():
    weights = np.zeros((6, 6), np.float32)
    weights[1, 4] = 1.0
    shown = pictures.heat(np.full((48, 48, 3), 128, np.uint8), weights).astype(int)
    redness = shown[..., 0] - shown[..., 2]
    row, column = np.unravel_index(np.argmax(redness), redness.shape)
    assert 16 <= row < 32 and 64 <= column < 80
    assert redness[80, 10] == 0
