"""The table of results: what counts as reached."""

import math

from internvl_jax.demo import targets


def only(metrics):
    (row,) = targets.rows(metrics)
    return row


def test_each_language_has_its_own_bound():
    values = {"en": 0.59, "zh": 0.56, "ko": 0.54, "es": 0.60}
    row = only({f"zero_shot.scenes.{x}": v for x, v in values.items()})
    assert row.missed == ["en", "ko"] and row.verdict == "missed en ko"
    assert row.figure.wanted == "en ≥ 60 %, others ≥ 55 %"


def test_upper_bounds_and_values_that_are_no_numbers():
    assert only({"peak_rss_gib": 3.9}).verdict == "reached"
    assert only({"peak_rss_gib": 4.1}).verdict == "missed"
    assert only({"export.max_difference": math.nan}).verdict == "missed"
    assert only({"caption.color": math.nan}).verdict == "missed"


def test_derived_figures():
    metrics = {"chat.accuracy": 0.8, "chat.majority_baseline": 0.5}
    for mode, value in (("c", 0.5), ("g", 0.75)):
        for way in ("i2t", "t2i"):
            metrics |= {f"retrieval.{mode}.{x}.{way}_r1": value for x in ("en", "zh")}
    derived = targets.derived(metrics)
    assert derived["retrieval.g.mean_r1"] == 0.75
    assert derived["retrieval.g_minus_c"] == 0.25
    assert math.isclose(derived["chat.above_baseline"], 0.3)


def test_text_table_shows_values_baselines_and_targets():
    metrics = {"zero_shot.unseen_color": 0.9, "untrained.zero_shot.unseen_color": 0.125}
    text = targets.as_text(targets.rows(metrics))
    line = text.splitlines()[1]
    assert line.split()[-8:] == ["90.0", "%", "12.5", "%", "≥", "85", "%", "reached"]
