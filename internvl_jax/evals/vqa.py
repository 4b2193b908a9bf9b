"""Dialogue benchmarks: questions about images with short answers (paper Table 9)."""

import json
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
from internvl_jax.evals import answers, files, scores
from internvl_jax.evals.chat import write_answers
from internvl_jax.evals.features import Params
from internvl_jax.evals.files import DatasetError, Place
from internvl_jax.models import ChatConfig

EMBEDDED = "embedded"
SHORT = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Benchmark:
    """A file of questions `<root>/<name>/questions.jsonl` with pictures below `<root>/<name>/`.

    Lines: {"question_id", "image", "question", and "answers" (list) or "answer"; POPE, MME:
    "category"; choices: "options" {letter: text}}. metric: "vqa", "exact", "pope", "mme", "choice".
    count: questions of the protocol; prompt: what follows the question on a line of its own.
    """

    metric: str
    count: int
    prompt: str = SHORT
    max_new_tokens: int = 128


BENCHMARKS = {
    "vqav2": Benchmark("vqa", 214354),  # val: the answers of test-dev are on the server alone
    "okvqa": Benchmark("vqa", 5046),
    "textvqa": Benchmark("vqa", 5000),
    "vizwiz": Benchmark("vqa", 4319, f"{UNANSWERABLE}\n{SHORT}"),
    "gqa": Benchmark("exact", 12578),
    "pope": Benchmark("pope", 8910),
    "mme": Benchmark("mme", 2114, SHORT),  # perception: ten of the fourteen tasks
    "mmbench": Benchmark("choice", 4377, LETTER, 1024),
}


@dataclass(frozen=True)
class Question:
    """One question; `label` is the answer, "yes"/"no", or the letter."""

    number: Any
    image: Any
    text: str
    references: tuple[str, ...]
    category: str = ""
    options: tuple[tuple[str, str], ...] = ()


@dataclass
class Vqa:
    """Answers of a chat model, scored as each benchmark prescribes. Greedy; images are padded.

    datasets: names of `BENCHMARKS`, or "embedded" (questions about held-out scenes, under every
    metric). root: where the published ones lie; partial: take what is there.

    Figures, as fractions except MME's points: `<set>.accuracy` (VQA accuracy, exact match, choice),
    `pope.<category>.f1` and `pope.f1`, their mean; `mme.<task>`, `mme.total`. Embedded:
    `embedded.<metric>`. `details`: "<set>" → questions, answers, expected.
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
        size, sets = config.input_size, []
        for name in self.datasets:
            if name == EMBEDDED:
                asked = scene_questions(self.scenes, size)
                one = Benchmark("", 0, "", 24)
            elif name in BENCHMARKS:
                one = BENCHMARKS[name]
                asked = read(name, Path(self.root), self.partial)
            else:
                raise DatasetError(
                    f"unknown data set {name!r}; there are embedded, {', '.join(BENCHMARKS)}"
                )
            sets.append((name, one, asked))
        for name, one, asked in sets:
            texts = [f"{q.text}\n{one.prompt}" if one.prompt else q.text for q in asked]
            if isinstance(asked[0].image, Place):
                pictures = files.Pictures([q.image for q in asked], size, _padded)
            else:
                pictures = np.stack([q.image for q in asked])
            decoding = Decoding(
                max_new_tokens=one.max_new_tokens, stop_ids=(self.tokenizer.eos_id,)
            )
            given = write_answers(
                config, params, pictures, texts, self.tokenizer, self.template, decoding,
                self.batch_size,
            )  # fmt: skip
            self.details[name] = {
                "questions": texts,
                "answers": given,
                "expected": [q.references[0] for q in asked],
            }
            if name == EMBEDDED:
                yield from _embedded(asked, given)
            else:
                for key, value in score(one.metric, asked, given).items():
                    yield f"{name}.{key}", value


def score(
    metric: str, asked: Sequence[Question], given: Sequence[str]
) -> dict[str, float]:
    """Figures of a metric, by name."""
    expected = [q.references[0] for q in asked]
    if metric == "vqa":
        each = [
            answers.vqa_accuracy(a, q.references) for a, q in zip(given, asked, strict=True)
        ]
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
    if metric == "mme":
        images = [_identity(q.image) for q in asked]
        return answers.mme(given, expected, images, [q.category for q in asked])
    letters = [
        answers.chosen(a, dict(q.options)) for a, q in zip(given, asked, strict=True)
    ]
    return {"accuracy": float(np.mean([x == e for x, e in zip(letters, expected, strict=True)]))}


def _equal(given: Sequence[str], expected: Sequence[str]) -> list[bool]:
    normal: Callable[[str], str] = scores.normalise_answer
    return [normal(a) == normal(e) for a, e in zip(given, expected, strict=True)]


def _identity(one: Any) -> str:
    return f"{one.path}:{one.offset}" if isinstance(one, Place) else str(hash(one.tobytes()))


def _padded(picture: Image.Image, size: int) -> np.ndarray:
    return image.square(image.pad_to_square(picture), size)


def read(name: str, root: Path, partial: bool = False) -> list[Question]:
    """The questions of a benchmark. Raises DatasetError: missing, repeated ids, other counts."""
    folder, one = root / name, BENCHMARKS[name]
    layout = f"put {name}/questions.jsonl and its pictures below {root} (docs/evaluation.md)"
    file = folder / "questions.jsonl"
    if not file.is_file():
        raise DatasetError(f"{name}: no questions at {file}; {layout}")
    asked, seen = [], set()
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                question = Question(
                    record["question_id"],
                    Place(folder / record["image"]),
                    record["question"],
                    tuple(record.get("answers") or [record["answer"]]),
                    record.get("category", ""),
                    tuple(record.get("options", {}).items()),
                )
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                raise DatasetError(f"{file}:{number}: not a question: {error!r}") from error
            if question.number in seen:
                raise DatasetError(f"{file}:{number}: question_id {question.number} is repeated")
            seen.add(question.number)
            if question.options:
                choices = "\n".join(f"{letter}. {option}" for letter, option in question.options)
                question = Question(
                    question.number, question.image, f"{question.text}\n{choices}",
                    question.references, question.category, question.options,
                )  # fmt: skip
            asked.append(question)
    if (len(asked) != one.count and not partial) or not asked:
        raise DatasetError(
            f"{name}: found {len(asked)} questions where the protocol has {one.count}; {layout}. "
            "The option partial=True evaluates what is there"
        )
    files.present([q.image for q in asked])
    return asked


def scene_questions(count: int, size: int) -> list[Question]:
    """English questions about held-out scenes: one open question, and a yes/no pair, of each."""
    asked = []
    rng = np.random.default_rng(0)
    chosen = [scenes.scene("test", index) for index in range(count)]
    for one, pixels in zip(chosen, scenes.render(chosen, size), strict=True):
        pairs = questions_of.about_scene(one.description, "en")
        open_ones = [pair for pair in pairs if pair[1] not in ("yes", "no")]
        question, answer = open_ones[rng.integers(len(open_ones))]
        asked.append(Question(len(asked), pixels, question, (answer,) * 10, "open"))
        for question, answer in [pair for pair in pairs if pair[1] in ("yes", "no")][:2]:
            asked.append(Question(len(asked), pixels, question, (answer,) * 10, "is_there"))
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
