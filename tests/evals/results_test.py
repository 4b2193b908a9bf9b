"""What `evaluate` prints and writes: the paper's numbers, CLIP_benchmark's schema, the page."""

import json
import re

import pytest

from internvl_jax import cli
from internvl_jax.evals import evaluator, page, published, results, tables

FIGURES = {
    "zero_shot.imagenet1k.en.top1": 0.8,
    "zero_shot.imagenet1k.en.top5": 0.9,
    "retrieval.coco.g.en.i2t_r1": 0.5,
    "vqa.mme.total": 1500.0,
    "captioning.nocaps.en.cider": 1.1,
    "knn.scenes.top1": 0.25,
}
DETAILS = {
    "captioning": {"caveat": "own words"},
    "zero_shot": {"prompts.imagenet1k.en": "CLIP_benchmark, 80 templates"},
}


def test_the_table_has_the_papers_numbers_and_what_must_be_said():
    lines = results.table(FIGURES, DETAILS).splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    assert cells[0] == ["zero_shot.imagenet1k.en.top1", "80.00", "InternVL-C 83.2"]
    assert cells[2][1:] == ["50.00", "InternVL-G 74.9"]
    assert cells[3][1:] == ["1500.00", "Chat 13B MLP 1546.9, Chat 13B QLLaMA 1586.4"]
    assert cells[4][1:] == ["110.00", "InternVL-G 113.7 (own word splitting)"]
    assert cells[5][1:] == ["25.00"]
    assert lines[6:] == [
        "captioning: own words",
        "zero_shot: imagenet1k.en: prompts of CLIP_benchmark, 80 templates",
    ]


def test_records_follow_the_schema_of_clip_benchmark():
    first, second, *_ = results.records(FIGURES, "InternVL", "demo")
    assert first == {
        "dataset": "imagenet1k",
        "model": "InternVL",
        "pretrained": "demo",
        "task": "zeroshot_classification",
        "language": "en",
        "metrics": {"acc1": 0.8, "acc5": 0.9},
    }
    assert second["metrics"] == {"text_retrieval_recall@1": 0.5}
    assert second["task"] == "zeroshot_retrieval"
    assert (second["dataset"], second["model"]) == ("coco", "InternVL-g")
    (third,) = results.records({"zero_shot.imagenet1k.ja.top1": 0.6}, "InternVL", "demo")
    assert (third["dataset"], third["language"]) == ("imagenet1k", "jp")


def test_the_page_has_a_bar_for_each_figure_and_marks_for_the_paper(tmp_path):
    page.write(tmp_path / "p.html", FIGURES, DETAILS, "<demo>")
    text = (tmp_path / "p.html").read_text()
    plots = dict(re.findall(r"<tr><td>(\S+?)</td>.*?(<svg.*?</svg>)", text))
    widths = {name: re.findall(r'y="3" width="([\d.]+)"', plot) for name, plot in plots.items()}
    # Bars end where their share of the plot's 320 pixels does: of 100, of 2000 points, of 200.
    assert widths["imagenet1k.en.top1"] == ["256.0"] and widths["mme.total"] == ["240.0"]
    assert widths["nocaps.en.cider"] == ["176.0"] and len(plots) == len(FIGURES)
    marked = {name: plot.count("<path") for name, plot in plots.items() if "<path" in plot}
    assert marked == {
        "imagenet1k.en.top1": 1, "coco.g.en.i2t_r1": 1, "mme.total": 2, "nocaps.en.cider": 1,
    }  # fmt: skip
    assert "InternVL-G 74.9</span> -24.9" in text and "<h2>knn</h2>" in text
    assert "<p>own words</p>" in text and "&lt;demo&gt;" in text and "<demo>" not in text


def test_the_command_prints_and_writes(tmp_path, capsys):
    words = ["evaluate", "--checkpoint=demo", "--evals=knn"]
    cli.main([*words, f"--json={tmp_path / 'f.json'}", f"--page={tmp_path / 'f.html'}"])
    assert capsys.readouterr().out.startswith("knn.scenes.top1  ")
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["figures"]["knn.scenes.top1"] > 0.8
    assert written["records"][0]["metrics"]["acc1"] == written["figures"]["knn.scenes.top1"]
    text = (tmp_path / "f.html").read_text()
    assert text.count("<svg") == 1 + 3 and "<td>scenes.top1</td>" in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--evals=retreival"], 2, "did you mean 'retrieval'"),
        (["--table=xdt"], 2, "did you mean 'xtd'"),
        (["--table=zero_shot,multilingual"], 2, "'zero_shot' serves two of these tables"),
        (["--evals=vqa"], 1, "needs another kind of model"),
        (["--table=coco"], 2, "there are linear_probe"),
        (["--table=xtd", "--data=/nowhere"], 1, "put xtd/XTD10/test_image_names.txt"),
    ],
)
def test_what_is_not_there_is_one_line_with_the_list(capsys, words, code, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--checkpoint=demo", *words])
    printed = capsys.readouterr().err
    assert caught.value.code == code and message in printed and printed.count("\n") == 1


def test_every_table_can_be_built_and_every_published_figure_has_an_evaluator():
    for name in tables.TABLES:
        evaluator.build(tables.options([name], "data", False))
    assert {name.split(".")[0] for name in published.PUBLISHED} <= set(evaluator.EVALUATORS)
