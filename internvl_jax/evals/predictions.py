"""Scores of answers and captions that another program wrote to a file: no model is loaded."""

import json
from pathlib import Path
from typing import Any

from internvl_jax.evals import answers, benchmarks, datasets, scores, vqa
from internvl_jax.evals.files import DatasetError, need

# What the benchmarks' own result files call them: VQA, GQA, VizWiz, MMBench, COCO; LLaVA's "text".
ID_KEYS = ("question_id", "questionId", "index", "image", "image_id")
ANSWER_KEYS = ("answer", "prediction", "text", "caption")
CAPTIONED = tuple(name for name, one in datasets.DATASETS.items() if one.family == "captioning")


def score(name: str, file: Path, root: Path, partial: bool = False) -> dict[str, float]:
    """Figures of a set of `benchmarks.BENCHMARKS` or `CAPTIONED`, named as those of its evaluator.

    file: a JSON list, or a line for each, of {"question_id": …, "answer": …}; of captions
    {"image_id": …, "caption": …}, the id being COCO's or NoCaps' number, or the file's name.

    Raises DatasetError: an unknown set; ids that are missing, repeated or unknown, with their
    counts; or what reading the questions raises. Pictures need not be there.
    """
    if name in CAPTIONED:
        return _captions(name, file, root, partial)
    if name not in benchmarks.BENCHMARKS:
        known = ", ".join((*benchmarks.BENCHMARKS, *CAPTIONED))
        raise DatasetError(f"unknown data set {name!r}; there are {known}")
    asked = benchmarks.read(name, root, partial, pictures=False)
    given = answers.by_id(read(file), [question.id for question in asked])
    found = vqa.score(benchmarks.BENCHMARKS[name].metric, asked, given)
    return {f"vqa.{name}.{key}": value for key, value in found.items()}


def _captions(name: str, file: Path, root: Path, partial: bool) -> dict[str, float]:
    pictures, references = datasets.captioned(
        name, "captioning", root, "en", 0, partial, pictures=False
    )
    names = [place.name or place.path.stem for place in pictures.places]
    given = answers.by_id(read(file), names, "pictures")
    found = {
        "cider": scores.cider(given, references, "en")[0],
        **scores.bleu_and_rouge(given, references, "en"),
    }
    return {f"captioning.{name}.en.{key}": value for key, value in found.items()}


def read(file: Path) -> list[tuple[str, str]]:
    """(id, answer) of a file of predictions. Raises DatasetError: not one."""
    text = need(file, "the file of predictions").read_text("utf-8")
    try:
        if text.lstrip().startswith("["):
            records = list(enumerate(json.loads(text), start=1))
        else:
            lines = enumerate(text.splitlines(), start=1)
            records = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except ValueError as error:
        raise DatasetError(f"{file} is neither a JSON list nor lines of JSON: {error}") from error
    return [(_value(r, ID_KEYS, file, n), _value(r, ANSWER_KEYS, file, n)) for n, r in records]


def _value(record: Any, keys: tuple[str, ...], file: Path, number: int) -> str:
    for key in keys:
        if isinstance(record, dict) and key in record:
            return str(record[key])
    raise DatasetError(f"{file}, record {number}: it has none of {', '.join(keys)}")
