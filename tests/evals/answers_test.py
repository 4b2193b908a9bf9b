"""Scores of short answers: worked examples of their published definitions."""

import json

import pytest
from PIL import Image

import internvl_jax
from internvl_jax.evals import answers, benchmarks, evaluator, files


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Yes.", "yes"),
        ("The  two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("none", "0"),
        ("an apple\n", "apple"),
        ("wont", "won't"),
        ("oclock", "o'clock"),
    ],
)
def test_answers_are_normalised_as_the_official_program_does(given, wanted):
    assert answers.normalise_vqa(given) == wanted


@pytest.mark.parametrize(
    ("matches", "accuracy"),
    # Leaving one person out: with m of ten agreeing, m sets have m − 1 matches and the others m.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_people(matches, accuracy):
    references = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert answers.vqa_accuracy("Red.", references) == pytest.approx(accuracy)


def test_pope_reads_the_first_sentence():
    assert answers.yes_or_no("No, there is none. Yes") == "no"
    assert answers.yes_or_no("There is not one.") == "no"
    assert answers.yes_or_no("Yes, there is. No") == "yes"
    found = answers.pope(["yes", "yes", "no", "no"], ["yes", "no", "no", "yes"])
    assert found["f1"] == found["accuracy"] == found["precision"] == found["recall"] == 0.5


def test_mme_adds_questions_and_images_that_are_wholly_right():
    found = answers.mme(
        ["Yes", "No", "Yes.", "yes", "no", "maybe"],
        ["yes", "no", "yes", "no", "No", "yes"],
        ["a", "a", "b", "b", "c", "c"],
        ["count"] * 4 + ["color"] * 2,
    )
    assert found["count"] == pytest.approx(100 * (3 / 4 + 1 / 2))
    assert found["color"] == pytest.approx(100 * (1 / 2 + 0))
    assert found["total"] == found["count"] + found["color"]
    with pytest.raises(files.DatasetError, match="two questions of an image; count differs"):
        answers.mme(["yes"], ["yes"], ["a"], ["count"])


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The answer is C.", "C"),
        ("A dog is running here", "A"),
        ("it is a cat", "B"),
        ("cat or dog", None),
        ("A", "A"),
        ("nothing", None),
    ],
)
def test_a_choice_is_a_letter_or_the_text_of_one_option(answer, letter):
    assert answers.chosen(answer, {"A": "dog", "B": "cat", "C": "cow"}) == letter


def test_predictions_must_fit_the_questions():
    good = [("2", "b"), ("1", "a")]
    assert answers.by_id(good, ["1", "2"]) == ["a", "b"]
    with pytest.raises(
        files.DatasetError,
        match=r"the 4 questions: ids 2 missing .first: 3, 4., 1 repeated .first: 2.",
    ):
        answers.by_id([*good, good[0]], ["1", "2", "3", "4"])
    with pytest.raises(files.DatasetError, match=r"ids 1 unknown .first: 2."):
        answers.by_id(good, ["1"])


def _write(root, records):
    (root / "pope").mkdir(exist_ok=True)
    Image.new("RGB", (60, 40), "red").save(root / "pope" / "1.png")
    lines = "\n".join(json.dumps(record) for record in records)
    (root / "pope" / "questions.jsonl").write_text(lines)


@pytest.mark.slow
def test_a_benchmark_is_read_from_files_and_answered(tmp_path):
    model = internvl_jax.load("demo-chat")
    records = [
        {"question_id": n, "image": "1.png", "question": "is there a circle?", "answer": "no",
         "category": kind}
        for n, kind in enumerate(("random", "popular"))
    ]  # fmt: skip
    _write(tmp_path, records)
    options = dict(datasets=["pope"], root=str(tmp_path), partial=True)
    one = evaluator.build({"vqa": options}, model.experiment)["vqa"]
    found = dict(one.run(model.config, model.params))
    assert found["pope.f1"] == (found["pope.random.f1"] + found["pope.popular.f1"]) / 2
    assert one.details["pope"]["questions"][0].endswith(f"?\n{benchmarks.SHORT}")


@pytest.mark.slow
def test_dialogue_scores_of_the_demo_are_above_what_chance_reaches():
    model = internvl_jax.load("demo-chat")
    one = evaluator.build({"vqa": {}}, model.experiment)["vqa"]
    found = dict(one.run(model.config, model.params))
    assert found["embedded.vqa"] >= 0.6 and found["embedded.choice"] >= 0.5
    assert found["embedded.pope.accuracy"] >= 0.7  # always yes: 0.5, F1 0.667
    assert found["embedded.pope.f1"] >= 0.75 and found["embedded.mme"] >= 100  # blind: 50
