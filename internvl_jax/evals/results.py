"""Figures for people and programs: a table beside the paper's, and CLIP_benchmark's JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_jax.evals.published import PUBLISHED, percent

# Ours → CLIP_benchmark's names.
_METRICS = {
    "top1": "acc1",
    "top5": "acc5",
    "mean_per_class": "mean_per_class_recall",
    **{f"i2t_r{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
    **{f"t2i_r{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)},
}
_TASKS = {
    "zero_shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "linear_probe": "linear_probe",
    "captioning": "captioning",
}
_MODES = ("c", "g", "itm")
_LANGUAGES = {"zh": "cn", "ja": "jp"}


def table(figures: Mapping[str, float], details: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per figure: name, value in per cent, the paper's; then what must be said of them."""
    rows = []
    for name, value in figures.items():
        paper = ", ".join(f"{model} {x:g}" for model, x in PUBLISHED.get(name, {}).items())
        evaluator, metric = name.split(".")[0], name.split(".")[-1]
        if "caveat" in details.get(evaluator, {}) and metric.startswith(("cider", "bleu", "rouge")):
            paper += " (own word splitting)"
        rows.append((name, f"{percent(name, value):.2f}", paper))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{n:<{widths[0]}}  {v:>{widths[1]}}  {p}".rstrip() for n, v, p in rows]
    for name, found in details.items():
        lines += [f"{name}: {note}" for note in notes(found)]
    return "\n".join(lines)


def notes(details: Mapping[str, Any]) -> list[str]:
    """What an evaluator wants said beside its figures: whose prompts, how words were split."""
    found = [details["caveat"]] if "caveat" in details else []
    for key, value in details.items():
        if key.startswith("prompts."):
            found.append(f"{key.removeprefix('prompts.')}: prompts of {value}")
    return found


def records(figures: Mapping[str, float], model: str, checkpoint: str) -> list[dict[str, Any]]:
    """Results in CLIP_benchmark's schema, one for each evaluator, data set, mode and language.

    {"dataset", "model", "pretrained", "task", "language", "metrics": {"acc1": …}}; its `build`
    command reads a file with one of them. The mode (c, g, itm) is the end of the model's name.
    """
    grouped: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in figures.items():
        evaluator, *middle, metric = name.split(".")
        grouped.setdefault((evaluator, ".".join(middle)), {})[_METRICS.get(metric, metric)] = value
    found = []
    for (evaluator, where), metrics in grouped.items():
        parts = where.split(".") if where else []
        mode = next((part for part in parts if part in _MODES), "")
        language = next((part for part in parts if len(part) == 2 and part.isalpha()), "en")
        dataset = ".".join(part for part in parts if part not in (mode, language))
        found.append(
            {
                "dataset": dataset or "embedded",
                "model": f"{model}-{mode}" if mode else model,
                "pretrained": checkpoint,
                "task": _TASKS.get(evaluator, evaluator),
                "language": _LANGUAGES.get(language, language),
                "metrics": metrics,
            }
        )
    return found


def write(
    path: Path, figures: Mapping[str, float], details: Mapping[str, Any], model: str, source: str
) -> None:
    """The JSON file: figures by name, records, the paper's numbers, and the notes."""
    content = {
        "checkpoint": source,
        "figures": dict(figures),
        "published": {name: PUBLISHED[name] for name in figures if name in PUBLISHED},
        "notes": {name: notes(found) for name, found in details.items() if notes(found)},
        "records": records(figures, model, source),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
