"""The main job from end to end: figures, resuming, refusals, export."""

import json
import re
import shutil

import numpy as np
import pytest

import internvl_jax
from internvl_jax import convert
from internvl_jax.data.text import LANGUAGES
from internvl_jax.demo import job
from internvl_jax.models import bind
from internvl_jax.train.workdir import WorkdirError


def evaluation(workdir, name):
    return json.loads((workdir / "evaluations" / f"{name}.json").read_text())


def last_of(configs, family):
    return [stage for stage, config in configs.items() if config.model.family == family][-1]


def test_metrics_json_has_every_figure(finished, configs):
    workdir, metrics = finished
    assert json.loads((workdir / "metrics.json").read_text()) == metrics
    expected = {"zero_shot.unseen_color", "zero_shot.unseen_shape"}
    expected |= {"caption.color", "caption.shape", "chat.accuracy", "chat.majority_baseline"}
    for language in LANGUAGES:
        expected |= {
            f"zero_shot.{name}.{language}" for name in ("scenes", "unseen_pairs", "digits")
        }
        expected.add(f"caption.cider.{language}")
        for mode in ("c", "g"):
            expected |= {f"retrieval.{mode}.{language}.{way}_r1" for way in ("i2t", "t2i")}
    assert expected <= set(metrics)
    assert {f"untrained.{name}" for name in expected} <= set(metrics)
    for stage in configs:
        assert metrics[f"seconds.{stage}"] > 0
        assert np.isfinite(metrics[f"final.{stage}.loss"])
    first = next(stage for stage, config in configs.items() if config.model.family == "internvl")
    assert {f"after_{first}.zero_shot.scenes.en", "final.generative.itm"} <= set(metrics)
    assert 0 < metrics["peak_rss_gib"] < 16
    total = sum(v for n, v in metrics.items() if re.fullmatch(r"seconds\.(?!total).*", n))
    assert metrics["seconds.total"] == pytest.approx(total)


def test_figures_without_prefix_are_those_of_the_last_stage_that_has_them(finished, configs):
    workdir, metrics = finished
    for family, name in (("internvl", "zero_shot.scenes.en"), ("chat", "chat.accuracy")):
        stage = last_of(configs, family)
        assert metrics[name] == evaluation(workdir, stage)["figures"][name]
        untrained = evaluation(workdir, f"untrained.{stage}")["figures"][name]
        assert metrics[f"untrained.{name}"] == untrained


def test_a_second_run_trains_and_evaluates_nothing(finished, run_small, capsys):
    workdir, metrics = finished
    before = {f: f.stat().st_mtime_ns for f in workdir.rglob("evaluations/*.json")}
    again = run_small(workdir)
    assert {**again, "peak_rss_gib": 0} == {**metrics, "peak_rss_gib": 0}
    assert before == {f: f.stat().st_mtime_ns for f in workdir.rglob("evaluations/*.json")}
    printed = capsys.readouterr()
    assert "evaluating" not in printed.err and "frozen" not in printed.err
    assert "Zero-shot" in printed.out and "report.html" in printed.out


def test_a_run_that_lost_an_evaluation_makes_only_that_one_again(
    finished, run_small, configs, tmp_path, capsys
):
    workdir, metrics = finished
    stage = last_of(configs, "chat")
    copy = shutil.copytree(workdir, tmp_path / "copy")
    (copy / "evaluations" / f"{stage}.json").write_text('{"key": {"checkpoi')  # the disk was full
    assert run_small(copy)["chat.accuracy"] == metrics["chat.accuracy"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "evaluating" in line]
    assert lines == [f"== evaluating {stage}"]


def test_stages_of_another_config_are_not_passed_off_as_this_one(finished, run_small, configs):
    workdir, _ = finished
    with configs["language"].unlocked():
        configs["language"].optimizer.weight_decay = 0.5
    with pytest.raises(WorkdirError, match=r"language was trained .*optimizer\.weight_decay"):
        run_small(workdir, configs)


def test_stages_that_started_from_other_weights_are_not_mixed(
    finished, run_small, configs, tmp_path
):
    workdir, _ = finished
    second, third = list(configs)[1:3]
    for entry in (*configs, "record.json"):
        (tmp_path / entry).symlink_to(workdir / entry)
    # As if the second stage had been trained again since: other weights under the same name.
    record = json.loads((workdir / "record.json").read_text())
    record["origins"][third][second] = "0" * 64
    (tmp_path / "record.json").unlink()
    (tmp_path / "record.json").write_text(json.dumps(record))
    shutil.copytree(workdir / "evaluations", tmp_path / "evaluations")
    with pytest.raises(WorkdirError, match=f"{third} started from other weights .*{second}"):
        run_small(tmp_path, configs)


def test_export_is_the_official_layout_and_gives_the_same_features(finished, configs):
    workdir, metrics = finished
    assert metrics["export.max_difference"] <= job.MAX_EXPORT_DIFFERENCE
    config, params = convert.load_torch_layout(workdir / "export")
    trained = internvl_jax.load(workdir / last_of(configs, "internvl"))
    ids = np.array([[1, 20, 30, 40, 2, 0]], np.int32)
    ours = bind(trained.config, trained.params).encode_text(ids)
    np.testing.assert_allclose(bind(config, params).encode_text(ids), ours, atol=1e-5)


def test_the_shipped_checkpoint_is_made_from_a_finished_job(
    finished, configs, tmp_path, monkeypatch, load_script
):
    workdir, _ = finished
    target = tmp_path / "assets"
    load_script("make_demo_asset").make(workdir, target, limit_mb=10.0)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    assert size <= 10e6
    monkeypatch.setattr(
        internvl_jax.loading,
        "SHIPPED",
        {"demo": target / "internvl", "demo-chat": target / "chat"},
    )
    texts = ["a large red star", "un anillo verde"]
    trained = internvl_jax.load(workdir / last_of(configs, "internvl"))
    shipped = internvl_jax.load("demo")
    np.testing.assert_allclose(shipped.encode_text(texts), trained.encode_text(texts), atol=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    question = "what color is the object?"
    answers = [
        internvl_jax.load(source).chat(pixels[0], question, max_new_tokens=4)
        for source in (workdir / last_of(configs, "chat"), "demo-chat")
    ]
    assert answers[0] == answers[1]
