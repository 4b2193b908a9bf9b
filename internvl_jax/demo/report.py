"""The report: one HTML file with everything in it, made from the results of the main job."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np

from internvl_jax.data import scenes, text
from internvl_jax.demo import pictures, targets

_LOSSES = ("loss", "itc", "itm", "itg")
_TERMS = {
    "loss": "loss (sum)",
    "itc": "contrast (ITC)",
    "itm": "matching (ITM)",
    "itg": "captioning (ITG)",
}
_TOP = 5  # hits shown per query
_QUERIES = 2  # queries per language and direction, besides one that failed
_CAPTIONS = 8
_QUESTIONS = 6  # per language
_SHARP_QUERIES = 4  # attention maps of single queries per image
_PACKAGES = ("internvl-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def loss_terms(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The losses among the columns of a run's metrics, the whole one first."""
    return [name for name in _LOSSES if any(name in row for row in rows)]


def write(
    path: Path,
    configs: Mapping[str, Any],
    metrics: Mapping[str, float],
    details: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    purposes: Mapping[str, str],
) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        configs: stage → experiment config, in order.
        metrics: as in metrics.json.
        details: evaluator → its details for the last checkpoint it judged, and "attention" →
            images and maps; sections without details are left out.
        curves: stage → the rows of its metrics.jsonl.
        purposes: stage → a sentence on it, where there is one.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("internvl_jax.demo", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        languages=text.LANGUAGE_NAMES,
        table=targets.rows(metrics),
        stages=_stages(configs, metrics, purposes),
        after=_after(metrics),
        charts=_charts(configs, curves),
        confusion=_confusion(details["zero_shot"]) if "zero_shot" in details else None,
        retrieval=_retrieval(details["retrieval"]) if "retrieval" in details else None,
        captions=_captions(details["caption"]) if "caption" in details else None,
        chat=_chat(details["chat"]) if "chat" in details else None,
        attention=_attention(details["attention"]) if "attention" in details else None,
        seconds=_seconds(metrics),
        machine=_machine(configs),
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def _stages(
    configs: Mapping[str, Any], metrics: Mapping[str, float], purposes: Mapping[str, str]
) -> list[dict[str, Any]]:
    return [
        {
            "name": stage,
            "purpose": purposes.get(stage, ""),
            "objective": config.objective,
            "starts_from": ", ".join(Path(s["path"]).name for s in config.init_from) or "scratch",
            "trainable": "everything" if config.trainable == ".*" else config.trainable,
            "steps": config.steps,
            "batch_size": config.batch_size,
            "seconds": metrics.get(f"seconds.{stage}"),
            "loss": metrics.get(f"final.{stage}.loss"),
        }
        for stage, config in configs.items()
    ]


def _after(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """The main figures of checkpoints before the last, by stage."""
    stages = dict.fromkeys(n.split(".")[0] for n in metrics if n.startswith("after_"))
    found = []
    for stage in stages:
        own = {n.removeprefix(f"{stage}."): v for n, v in metrics.items() if n.startswith(stage)}
        rows = [row for row in targets.rows({**own, **targets.derived(own)}) if row.figure.target]
        found.append({"stage": stage.removeprefix("after_"), "table": rows})
    return found


def _charts(
    configs: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[dict[str, Any]]:
    charts = []
    for stage in configs:
        rows = curves[stage]
        terms = loss_terms(rows)
        series = {
            _TERMS[term] if len(terms) > 1 else term: [
                (row["step"], float(row[term])) for row in rows if term in row
            ]
            for term in terms
        }
        svg = pictures.line_chart(series, f"Training loss of stage {stage}")
        charts.append({"stage": stage, "svg": svg, "legend": list(series)})
    return charts


def _confusion(details: Mapping[str, Any]) -> dict[str, Any]:
    """English matrix over all 48 pairs: seen pairs and never-seen ones are different images."""
    names = details["classes.scenes"]
    counts = details["scenes.en"]["confusion"] + details["unseen_pairs.en"]["confusion"]
    unseen = {i for i, pair in enumerate(scenes.ALL_PAIRS) if pair in scenes.HELD_OUT_PAIRS}
    wrong = counts * (1 - np.eye(len(names), dtype=counts.dtype))
    largest = np.argsort(-wrong, axis=None, kind="stable")[:10]
    confusions = [
        {
            "true": names[row] + (" †" if row in unseen else ""),
            "taken": names[column] + (" †" if column in unseen else ""),
            "share": f"{counts[row, column]} of {counts[row].sum()}",
        }
        for row, column in (divmod(int(i), len(names)) for i in largest)
        if wrong[row, column]
    ]
    return {"svg": pictures.confusion_matrix(counts, names, unseen), "largest": confusions}


def _retrieval(details: Mapping[str, Any]) -> dict[str, Any]:
    """The first queries of each language, and the first that failed, in both directions."""
    images = details["images"]
    mode = "g" if "g.en" in details else "c"
    groups = []
    for language in (x for x in text.LANGUAGES if f"{mode}.{x}" in details):
        found, captions = details[f"{mode}.{language}"], details[f"captions.{language}"]
        queries = {}
        for way in ("t2i", "i2t"):
            rank, hits = found[f"{way}_rank"], found[f"{way}_hits"]
            failed = [int(i) for i in np.flatnonzero(rank > 0) if i >= _QUERIES][:1]
            queries[way] = [
                {
                    "image": pictures.data_uri(images[q]),
                    "caption": captions[q],
                    "rank": int(rank[q]) + 1,
                    "hits": [
                        {
                            "image": pictures.data_uri(images[h]) if way == "t2i" else None,
                            "caption": captions[h],
                            "right": int(h) == q,
                        }
                        for h in hits[q][:_TOP]
                    ],
                }
                for q in [*range(min(_QUERIES, len(rank))), *failed]
            ]
        groups.append({"language": language, **queries})
    return {"mode": mode.upper(), "count": len(images), "groups": groups}


def _captions(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first held-out images with a caption in each language."""
    languages = [x for x in text.LANGUAGES if f"captions.{x}" in details]
    return [
        {
            "image": pictures.data_uri(image),
            "reference": details[f"references.{languages[0]}"][i][0],
            "captions": [
                {
                    "language": language,
                    "text": details[f"captions.{language}"][i],
                    "reference": details[f"references.{language}"][i][0],
                    "right": details[f"captions.{language}"][i]
                    in details[f"references.{language}"][i],
                }
                for language in languages
            ],
        }
        for i, image in enumerate(details["images"][:_CAPTIONS])
    ]


def _chat(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first question of each kind, a few per language."""
    groups = []
    for language in dict.fromkeys(details["languages"]):
        kinds: dict[str, int] = {}
        for i, (other, kind) in enumerate(zip(details["languages"], details["kinds"], strict=True)):
            if other == language:
                kinds.setdefault(kind, i)
        chosen = list(kinds.values())[:_QUESTIONS]
        turns = [
            {
                "image": pictures.data_uri(details["images"][i]),
                **{name: details[name][i] for name in ("questions", "answers", "expected")},
                "right": bool(details["right"][i]),
            }
            for i in chosen
        ]
        groups.append({"language": language, "turns": turns})
    return groups


def _attention(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each image, the mean over the queries, and the queries with the most pointed maps."""
    shown = []
    for image, maps in zip(details["images"], details["maps"], strict=True):
        share = maps / np.maximum(maps.sum(axis=(1, 2), keepdims=True), 1e-12)
        order = np.argsort(-share.max(axis=(1, 2)), kind="stable")[:_SHARP_QUERIES]
        shown.append(
            {
                "image": pictures.data_uri(image),
                "mean": pictures.data_uri(pictures.heat(image, maps.mean(axis=0))),
                "queries": [
                    {
                        "number": int(q) + 1,
                        "image": pictures.data_uri(pictures.heat(image, maps[q])),
                    }
                    for q in order
                ],
            }
        )
    return shown


def _seconds(metrics: Mapping[str, float]) -> dict[str, float]:
    named = {n.removeprefix("seconds."): v for n, v in metrics.items() if n.startswith("seconds.")}
    return {**{n: v for n, v in named.items() if n != "total"}, "total": named.get("total", 0.0)}


def _machine(configs: Mapping[str, Any]) -> dict[str, str]:
    """Versions and seed. The machine is described by kind, never by name."""
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "Seed": ", ".join(sorted({str(config.seed) for config in configs.values()})),
        "Devices": f"{len(devices)} × {devices[0].device_kind}",
        "Host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        **versions,
    }
