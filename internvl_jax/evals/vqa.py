"""Dialogue benchmarks: questions about images with short answers (paper Table 9)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_jax.data import image, scenes
from internvl_jax.data import questions as questions_of
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.decoding import Decoding
from internvl_jax.evals import answers, benchmarks, files, scores
from internvl_jax.evals.chat import write_answers
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.evals.features import Params
from internvl_jax.evals.question_files import Question
from internvl_jax.models import ChatConfig


@dataclass
class Vqa:
    """Answers of a chat model, scored as each benchmark prescribes. Greedy; images are padded.

    datasets: names of `benchmarks.BENCHMARKS`, or "embedded" (questions about held-out scenes,
    under every metric). root: where the published ones lie; partial: take what is there.

    Figures, as fractions except MME's points: `<set>.<figure of score>`; `embedded.<metric>`.
    `details`: "<set>" → ids, questions, answers, expected.
    """

    tokenizer: Tokenizer
    template: str = "vicuna_v1"
    datasets: tuple[str, ...] = (EMBEDDED,)
    root: str = "data"
    partial: bool = False
    scenes: int = 60
    batch_size: int = 60
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: ChatConfig, params: Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        self.details = {}
        size = config.input_size
        # All are read before the first is answered.
        sets = {
            name: scene_questions(self.scenes, size)
            if name == EMBEDDED
            else benchmarks.read(name, Path(self.root), self.partial)
            for name in self.datasets
        }
        for name, asked in sets.items():
            if name == EMBEDDED:
                prompt, length = "", 24
                pictures = np.stack([q.image for q in asked])
            else:
                one = benchmarks.BENCHMARKS[name]
                prompt, length = f"\n{one.prompt}", one.max_new_tokens
                pictures = files.Pictures([q.image for q in asked], size, _padded)
            texts = [q.text + prompt for q in asked]
            decoding = Decoding(max_new_tokens=length, stop_ids=(self.tokenizer.eos_id,))
            given = write_answers(
                config, params, pictures, texts, self.tokenizer, self.template, decoding,
                self.batch_size,
            )  # fmt: skip
            self.details[name] = {
                "ids": [q.id for q in asked],
                "questions": texts,
                "answers": given,
                "expected": [q.references[0] for q in asked],
            }
            if name == EMBEDDED:
                yield from _embedded(asked, given)
            else:
                for key, value in score(one.metric, asked, given).items():
                    yield f"{name}.{key}", value


def score(metric: str, asked: Sequence[Question], given: Sequence[str]) -> dict[str, float]:
    """Figures of a metric, by name, as fractions except MME's points.

    "vqa", "exact": `accuracy`. "pope": `<category>.f1` and so on, and `f1`, the categories' mean.
    "mme": `<task>`, `total`. "choice": `accuracy`, the share of questions that are answered rightly
    in every order of their options, and `each`, the share of right rows.
    """
    expected = [q.references[0] for q in asked]
    if metric == "vqa":
        each = [answers.vqa_accuracy(a, q.references) for a, q in zip(given, asked, strict=True)]
        return {"accuracy": float(np.mean(each))}
    if metric == "exact":
        return {"accuracy": float(np.mean(_equal(given, expected)))}
    if metric == "pope":
        found, categories = {}, sorted({q.category for q in asked})
        for category in categories:
            rows = [i for i, q in enumerate(asked) if q.category == category]
            part = answers.pope([given[i] for i in rows], [expected[i] for i in rows])
            found |= {f"{category}.{name}" if category else name: v for name, v in part.items()}
        if len(categories) > 1:
            found["f1"] = float(np.mean([found[f"{c}.f1"] for c in categories]))
        return found
    groups = [q.group for q in asked]
    if metric == "mme":
        return answers.mme(given, expected, groups, [q.category for q in asked])
    letters = [answers.chosen(a, dict(q.options)) for a, q in zip(given, asked, strict=True)]
    right: dict[str, list[bool]] = {}
    for group, letter, label in zip(groups, letters, expected, strict=True):
        right.setdefault(group, []).append(letter == label)
    return {
        "accuracy": float(np.mean([all(hits) for hits in right.values()])),
        "each": float(np.mean([hit for hits in right.values() for hit in hits])),
    }


def _equal(given: Sequence[str], expected: Sequence[str]) -> list[bool]:
    normal: Callable[[str], str] = scores.normalise_answer
    return [normal(a) == normal(e) for a, e in zip(given, expected, strict=True)]


def _padded(picture: Image.Image, size: int) -> np.ndarray:
    return image.square(image.pad_to_square(picture), size)


def scene_questions(count: int, size: int) -> list[Question]:
    """English questions about held-out scenes: one open question, and a yes/no pair, of each."""
    asked = []
    rng = np.random.default_rng(0)
    chosen = [scenes.scene("test", index) for index in range(count)]
    for number, pixels in enumerate(scenes.render(chosen, size)):
        pairs = questions_of.about_scene(chosen[number].description, "en")
        yes_no = [pair for pair in pairs if pair[1] in ("yes", "no")]
        open_ones = [pair for pair in pairs if pair not in yes_no]
        some = [("open", *open_ones[rng.integers(len(open_ones))])]
        some += [("is_there", *pair) for pair in yes_no[:2]]
        for kind, question, answer in some:
            name = f"{number}/{len(asked)}"
            asked.append(
                Question(name, pixels, question, (answer,) * 10, kind, group=str(number))
            )
    return asked


def _embedded(asked: list[Question], given: list[str]) -> Iterator[tuple[str, float]]:
    def part(category):
        rows = [i for i, q in enumerate(asked) if q.category == category]
        return [asked[i] for i in rows], [given[i] for i in rows]

    open_ones, yes_no = part("open"), part("is_there")
    yield "embedded.exact", score("exact", asked, given)["accuracy"]
    yield "embedded.vqa", score("vqa", *open_ones)["accuracy"]
    for name, value in score("pope", *yes_no).items():
        yield f"embedded.pope.{name.removeprefix('is_there.')}", value
    yield "embedded.mme", score("mme", *yes_no)["total"]
    # Choice by content: the open answers among the colours and shapes that other scenes have.
    words = [*scenes.COLORS, *scenes.SHAPES]
    letters = dict(zip("ABCDEFGHIJKLMN", words, strict=True))
    right = [
        (answers.chosen(answer, letters), q.references[0])
        for answer, q in zip(open_ones[1], open_ones[0], strict=True)
        if q.references[0] in words
    ]
    if right:
        yield "embedded.choice", float(np.mean([letters.get(x) == e for x, e in right]))
