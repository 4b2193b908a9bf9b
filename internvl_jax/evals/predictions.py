"""Scores of answers that another program wrote to a file: no model is loaded."""

import json
from pathlib import Path
from typing import Any

from internvl_jax.evals import answers, benchmarks, vqa
from internvl_jax.evals.files import DatasetError, need

# What the benchmarks' own result files call them: VQA, GQA, VizWiz, MMBench; LLaVA's "text".
ID_KEYS = ("question_id", "questionId", "index", "image")
ANSWER_KEYS = ("answer", "prediction", "text")


def score(name: str, file: Path, root: Path, partial: bool = False) -> dict[str, float]:
    """Figures of a benchmark (`benchmarks.BENCHMARKS`), named as those of the evaluator `vqa`.

    file: a JSON list, or a line for each, of {"question_id": …, "answer": …}.

    Raises DatasetError: ids that are missing, repeated or unknown, with their counts; or what
    reading the questions raises. Their pictures need not be there.
    """
    asked = benchmarks.read(name, root, partial, pictures=False)
    given = answers.by_id(read(file), [question.id for question in asked])
    found = vqa.score(benchmarks.BENCHMARKS[name].metric, asked, given)
    return {f"vqa.{name}.{key}": value for key, value in found.items()}


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
