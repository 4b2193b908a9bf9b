"""Short answers to visual questions: normalisation, VQA accuracy, and the other scores."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from internvl_jax.evals.files import DatasetError

_DIGITS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}
_MARKS = ";/[]\"{}()=+\\_-><@`,?!"
# Words that lost their apostrophe, as the published list restores them.
_BARE = (
    "aint arent cant couldve couldnt didnt doesnt dont hadnt hasnt havent hed hes howd howll hows "
    "isnt itd itll maam mightnt mightve mustnt mustve neednt notve oclock oughtnt shant "
    "shouldve shouldnt somebodyd somebodyll somebodys someoned someonell someones somethingd "
    "somethingll thats thered therere theres theyd theyll theyre theyve twas wasnt weve werent "
    "whatll whatre whats whatve whens whered wheres whereve whod whodve wholl whos whove whyll "
    "whyre whys wont wouldve wouldnt yall youd youll youre youve"
)
_ENDINGS = ("nt", "ve", "re", "ll", "d", "s", "m")
_SPECIAL = {
    "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "whodve": "who'd've",
}  # fmt: skip


def _apostrophe(word: str) -> str:
    if word in _SPECIAL:
        return _SPECIAL[word]
    ending = next(e for e in _ENDINGS if word.endswith(e))
    stem = word.removesuffix(ending)
    return f"{stem}n't" if ending == "nt" else f"{stem}'{ending}"


CONTRACTIONS = {word.lower(): _apostrophe(word).lower() for word in _BARE.split(" ")}


def normalise_vqa(answer: str) -> str:
    """An answer as the official VQA evaluation compares it.

    Lower case; marks become nothing beside a space, or where the answer has a comma in a number,
    else a space; full stops go unless a digit follows; number words become digits, articles go,
    contractions get their apostrophe (visualqa.org/evaluation.html).
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    glued = bool(re.search(r"\d,\d", text))
    whole = text
    for mark in _MARKS:
        beside_space = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside_space or glued else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean over all leave-one-out sets of references of min(1, matches / 3).

    The references are usually ten people's answers; all are normalised as the answer is.
    """
    answer, references = normalise_vqa(answer), [normalise_vqa(r) for r in references]
    matches = sum(answer == r for r in references)
    return float(np.mean([min(1.0, (matches - (answer == r)) / 3) for r in references]))


def yes_or_no(answer: str) -> str:
    """POPE's reading: "no" if the first sentence has the word No, no or not, else "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """`f1` (of yes), `accuracy`, `precision`, `recall`, and `yes`, the share of yes answers."""
    said = np.array([yes_or_no(answer) == "yes" for answer in answers])
    true = np.array([label == "yes" for label in expected])
    hit = int(np.sum(said & true))
    precision, recall = hit / max(said.sum(), 1), hit / max(true.sum(), 1)
    return {
        "f1": float(2 * precision * recall / (precision + recall)) if hit else 0.0,
        "accuracy": float(np.mean(said == true)),
        "precision": float(precision),
        "recall": float(recall),
        "yes": float(said.mean()),
    }


def mme(
    answers: Sequence[str], expected: Sequence[str], images: Sequence[str], tasks: Sequence[str]
) -> dict[str, float]:
    """MME's scores by task, and their sum `total` (arXiv 2306.13394).

    A task's score is 100 × (share of questions right + share of images with both right). An answer
    is what its first word, else its first four letters, says; anything else is wrong.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for answer, label, image, task in zip(answers, expected, images, tasks, strict=True):
        text = answer.strip().lower()
        said = text if text in ("yes", "no") else next(
            (word for word in ("yes", "no") if word in text[:4]), "other"
        )  # fmt: skip
        right[task][image].append(said == label.lower())
    found = {}
    for task, by_image in right.items():
        uneven = [image for image, hits in by_image.items() if len(hits) != 2]
        if uneven:
            raise DatasetError(f"MME asks two questions of an image; {task} differs: {uneven[0]}")
        hits = np.array(list(by_image.values()))
        found[task] = float(100 * (hits.mean() + hits.all(axis=1).mean()))
    return {**found, "total": sum(found.values())}


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer to a multiple-choice question means, or None.

    A letter alone, with a mark, or as the only option letter among the words; else the one option
    whose text the answer contains (MMBench, arXiv 2307.06281 §4: its exact matching).
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [word for word in words if word in options]
    # "A" is also an article: alone or before nothing else it is a letter.
    if len(set(letters)) == 1 and (letters[0] != "A" or len(words) <= 3 or words[-1] == "A"):
        return letters[0]
    low = answer.lower()
    named = [letter for letter, option in options.items() if option.lower() in low]
    return named[0] if len(named) == 1 else None


def by_id(
    predictions: Sequence[tuple[str, str]], wanted: Sequence[str], what: str = "questions"
) -> list[str]:
    """The answers of (id, answer) in the order of the ids that are wanted, which are of `what`.

    Raises DatasetError that counts the missing, the repeated and the unknown ids, with the first
    of each.
    """
    found: dict[str, str] = {}
    repeated: dict[str, None] = {}  # in their order
    for one, answer in predictions:
        if one in found:
            repeated[one] = None
        found[one] = answer
    asked = set(wanted)
    parts = [
        f"{len(ids)} {fault} (first: {', '.join(ids[:3])})"
        for fault, ids in (
            ("missing", [one for one in wanted if one not in found]),
            ("repeated", list(repeated)),
            ("unknown", [one for one in found if one not in asked]),
        )
        if ids
    ]
    if parts:
        raise DatasetError(
            f"the predictions do not fit the {len(wanted)} {what}: ids {', '.join(parts)}"
        )
    return [found[one] for one in wanted]
