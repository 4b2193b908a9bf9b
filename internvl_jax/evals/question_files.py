"""Readers of the dialogue benchmarks' own files, as their makers publish them.

Each takes the root of all data sets and gives the questions in the order of the file. What is not
there raises DatasetError; a file of another layout raises what parsing it raises (KeyError, …).
"""

import base64
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_jax.evals.files import SUFFIXES, DatasetError, Encoded, Place, need

POPE_CATEGORIES = ("random", "popular", "adversarial")
# The ten perception tasks of MME, whose sum the paper gives.
MME_TASKS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
_CIRCULAR = 1_000_000  # MMBench: the copies of question n are n + 1,000,000, n + 2,000,000, …


@dataclass(frozen=True)
class Question:
    """One question.

    id: names it among all of its benchmark, in files of predictions too. image: of `files`, or
    uint8 [H, W, 3]. references: the right answers; "yes" or "no"; or a letter of `options`.
    group: questions that count together: those of one picture (MME), or one question with its
    options in another order (MMBench).
    """

    id: str
    image: Any
    text: str
    references: tuple[str, ...]
    category: str = ""
    options: tuple[tuple[str, str], ...] = ()
    group: str = ""


def own_lines(folder: Path) -> list[Question]:
    """`questions.jsonl` of any benchmark, the pictures' paths being relative to its folder.

    Lines: {"question_id", "image", "question", and "answers" (list) or "answer"; POPE and MME:
    "category"; choices: "options" {letter: text}, and "group" of one question in other orders}.
    """
    found = []
    file = folder / "questions.jsonl"
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                options = tuple(record.get("options", {}).items())
                name = str(record["question_id"])
                question = Question(
                    name,
                    Place(folder / record["image"]),
                    _with_options(record["question"], options),
                    tuple(record.get("answers") or [record["answer"]]),
                    record.get("category", ""),
                    options,
                    str(record.get("group", name if options else record["image"])),
                )
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                raise DatasetError(f"{file}:{number}: not a question: {error!r}") from error
            found.append(question)
    return found


def _with_options(text: str, options: tuple[tuple[str, str], ...]) -> str:
    return "\n".join([text, *(f"{letter}. {option}" for letter, option in options)])


def vqa(questions: str, annotations: str) -> Callable[[Path], list[Question]]:
    """VQAv2 and OK-VQA: a file of questions and one of ten people's answers, COCO's pictures."""

    def read(root: Path) -> list[Question]:
        asked = _json(need(root / questions, "the questions"))["questions"]
        answered = _json(need(root / annotations, "the answers"))["annotations"]
        answers = {
            record["question_id"]: tuple(one["answer"] for one in record["answers"])
            for record in answered
        }
        missing = [q["question_id"] for q in asked if q["question_id"] not in answers]
        if missing:
            raise DatasetError(
                f"{root / annotations} has no answers to {len(missing)} of {len(asked)} questions, "
                f"the first {missing[0]}"
            )
        return [
            Question(
                str(q["question_id"]), _coco(root, f"COCO_val2014_{q['image_id']:012d}.jpg"),
                q["question"], answers[q["question_id"]],
            )
            for q in asked
        ]  # fmt: skip

    return read


def gqa(root: Path) -> list[Question]:
    """The balanced questions of the test-dev split: {id: {"imageId", "question", "answer"}}."""
    records = _json(_first(root / "gqa", "testdev_balanced_questions.json", "questions1.2"))
    return [
        Question(key, Place(root / f"gqa/images/{q['imageId']}.jpg"), q["question"], (q["answer"],))
        for key, q in records.items()
    ]


def vizwiz(root: Path) -> list[Question]:
    """A list of {"image", "question", "answers"}; a question has the name of its picture."""
    records = _json(_first(root / "vizwiz", "val.json", "Annotations"))
    return [
        Question(
            q["image"], Place(root / "vizwiz/val" / q["image"]), q["question"],
            tuple(one["answer"] for one in q["answers"]),
        )
        for q in records
    ]  # fmt: skip


def textvqa(root: Path) -> list[Question]:
    """{"data": [{"question_id", "image_id", "question", "answers"}]}."""
    file = need(root / "textvqa/TextVQA_0.5.1_val.json", "the questions")
    return [
        Question(
            str(q["question_id"]), Place(root / f"textvqa/train_images/{q['image_id']}.jpg"),
            q["question"], tuple(q["answers"]),
        )
        for q in _json(file)["data"]
    ]  # fmt: skip


def pope(root: Path) -> list[Question]:
    """Three files of lines {"question_id", "image", "text", "label"}, numbered each from 1.

    Ids are the category and the number: random/1.
    """
    found = []
    for category in POPE_CATEGORIES:
        file = _first(root / "pope", f"coco_pope_{category}.json", "coco", "output/coco")
        for line in file.read_text("utf-8").splitlines():
            q = json.loads(line)
            found.append(
                Question(
                    f"{category}/{q['question_id']}", _coco(root, q["image"]), q["text"],
                    (q["label"],), category,
                )
            )  # fmt: skip
    return found


def mme(root: Path) -> list[Question]:
    """A folder for each task: a picture and a text of two lines "question TAB Yes" of one name.

    Some tasks have them in the folders images and questions_answers_YN. Ids are task/name/1 and 2.
    """
    base = root / "mme"
    folders = sorted(need(base, "the tasks").rglob(MME_TASKS[0]))
    if not folders:
        raise DatasetError(f"no folder {MME_TASKS[0]!r} in {base}")
    found = []
    for task in MME_TASKS:
        folder = need(folders[0].parent / task, "a task")
        split = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if split else folder).glob("*.txt"))
        pictures = {
            path.stem: path
            for path in (folder / "images" if split else folder).iterdir()
            if path.suffix.lower() in SUFFIXES
        }
        for text in texts:
            if text.stem not in pictures:
                raise DatasetError(f"{text} has no picture of its name")
            for number, line in enumerate(text.read_text("utf-8").splitlines(), start=1):
                question, _, answer = line.strip().rpartition("\t")
                question = question.removesuffix("Please answer yes or no.").strip()
                found.append(
                    Question(
                        f"{task}/{text.stem}/{number}", Place(pictures[text.stem]), question,
                        (answer.strip().lower(),), task, group=f"{task}/{text.stem}",
                    )
                )  # fmt: skip
    return found


def mmbench(root: Path) -> list[Question]:
    """A table with pictures in base64, or the index of the row that has the picture.

    A question comes again with its options in other orders: these have one group.
    """
    file = need(root / "mmbench/mmbench_dev_20230712.tsv", "the questions")
    rows = list(_table(file))
    pictures: dict[str, Encoded] = {}
    for row in rows:
        if len(row["image"]) > 64:  # as the makers' own reader tells an index from a picture
            where = f"{file}, index {row['index']}"
            pictures[row["index"]] = Encoded(file, where, base64.b64decode(row["image"]))
    found = []
    for row in rows:
        options = []
        for letter in "ABCD":
            if not row.get(letter):
                break
            options.append((letter, row[letter]))
        text = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        picture = pictures[row["index"] if row["index"] in pictures else row["image"]]
        found.append(
            Question(
                row["index"], picture, _with_options(text, tuple(options)), (row["answer"],),
                row.get("category", ""), tuple(options), str(int(row["index"]) % _CIRCULAR),
            )
        )  # fmt: skip
    return found


def _table(file: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a picture is longer than the 128 KiB that are allowed
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            yield {key: value or "" for key, value in row.items()}


def _json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8"))


def _first(folder: Path, name: str, *below: str) -> Path:
    """The file in the folder or in one of those below it."""
    for one in (folder, *(folder / sub for sub in below)):
        if (one / name).is_file():
            return one / name
    return need(folder / name, "the questions")


def _coco(root: Path, name: str) -> Place:
    return Place(root / "coco/val2014" / name)
