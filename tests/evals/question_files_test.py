"""Dialogue benchmarks in the layouts that their makers publish, and scores of answers to them."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax import cli
from internvl_jax.evals import benchmarks, files, predictions, vqa

COCO = "coco/val2014/COCO_val2014_000000000042.jpg"


def _write(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")


def _picture(root, name, color="red"):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), color).save(path)


def _ten(*answers):
    """Ten people's answers, of which the last is said by all others."""
    rest = [answers[-1]] * (10 - len(answers) + 1)
    return [*answers[:-1], *rest]


def _vqa(root, questions, annotations):
    asked = [
        {"image_id": 42, "question": f"what is {n}?", "question_id": 42000 + n} for n in range(2)
    ]
    answered = [
        {"question_id": q["question_id"], "image_id": 42, "question_type": "what is",
         "answer_type": "other", "multiple_choice_answer": "blue",
         "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i}
                     for i, a in enumerate(_ten("red", "blue"), 1)]}
        for q in asked
    ]  # fmt: skip
    _write(root, questions, {"info": {}, "data_subtype": "val2014", "questions": asked})
    _write(root, annotations, {"info": {}, "annotations": answered[::-1]})
    _picture(root, COCO)


def _vqav2(root):
    _vqa(root, "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
         "vqav2/v2_mscoco_val2014_annotations.json")  # fmt: skip


def _okvqa(root):
    _vqa(root, "okvqa/OpenEnded_mscoco_val2014_questions.json",
         "okvqa/mscoco_val2014_annotations.json")  # fmt: skip


def _gqa(root):
    records = {
        f"20100{n}": {"imageId": "n161313", "question": f"what is {n}?", "answer": "blue",
                      "fullAnswer": "it is blue.", "isBalanced": True}
        for n in range(2)
    }  # fmt: skip
    _write(root, "gqa/questions1.2/testdev_balanced_questions.json", records)
    _picture(root, "gqa/images/n161313.jpg")


def _vizwiz(root):
    records = [
        {"image": f"VizWiz_val_0000000{n}.jpg", "question": f"what is {n}?", "answerable": 1,
         "answers": [{"answer": a, "answer_confidence": "yes"} for a in _ten("red", "blue")]}
        for n in range(2)
    ]  # fmt: skip
    _write(root, "vizwiz/Annotations/val.json", records)
    for record in records:
        _picture(root, f"vizwiz/val/{record['image']}")


def _textvqa(root):
    records = [
        {"question_id": 34602 + n, "image_id": "003a8ae2ef43b901", "question": f"what is {n}?",
         "answers": _ten("red", "blue"), "set_name": "val"}
        for n in range(2)
    ]  # fmt: skip
    _write(root, "textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": records})
    _picture(root, "textvqa/train_images/003a8ae2ef43b901.jpg")


def _pope(root):
    for category in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": n, "image": "COCO_val2014_000000000042.jpg", "label": label,
             "text": f"Is there a {thing} in the image?"}
            for n, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")], start=1)
        ]  # fmt: skip
        text = "\n".join(map(json.dumps, lines)) + "\n"
        _write(root, f"pope/coco/coco_pope_{category}.json", text)
    _picture(root, COCO)


def _mme(root):
    text = "Is it a {}? Please answer yes or no.\tYes\nIs it a {}? Please answer yes or no.\tNo\n"
    for task in vqa_tasks():
        folder = f"mme/MME_Benchmark_release_version/{task}"
        split = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        _write(root, f"{folder}/{'questions_answers_YN/' if split else ''}7.txt",
               text.format("dog", "cat"))  # fmt: skip
        _picture(root, f"{folder}/{'images/' if split else ''}7.jpg")


def vqa_tasks():
    perception = "existence count position color posters celebrity scene landmark artwork OCR"
    return [*perception.split(), "code_reasoning"]


def _mmbench(root):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        buffer, "png"
    )
    first = {
        "index": "241", "question": "which one is\nit?", "hint": "look", "A": "a cat", "B": "a dog",
        "C": "", "D": "", "answer": "B", "category": "object", "source": "x", "split": "dev",
        "image": base64.b64encode(buffer.getvalue()).decode(),
    }  # fmt: skip
    turned = {**first, "index": "1000241", "A": "a dog", "B": "a cat", "answer": "A",
              "image": "241"}  # fmt: skip
    path = root / "mmbench/mmbench_dev_20230712.tsv"
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(first), delimiter="\t")
        writer.writeheader()
        writer.writerows([first, turned])


WRITERS = {
    "vqav2": _vqav2, "okvqa": _okvqa, "gqa": _gqa, "vizwiz": _vizwiz, "textvqa": _textvqa,
    "pope": _pope, "mme": _mme, "mmbench": _mmbench,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ids", "text", "references"),
    [
        ("vqav2", ["42000", "42001"], "what is 0?", _ten("red", "blue")),
        ("okvqa", ["42000", "42001"], "what is 0?", _ten("red", "blue")),
        ("gqa", ["201000", "201001"], "what is 0?", ["blue"]),
        ("vizwiz", ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"], "what is 0?",
         _ten("red", "blue")),
        ("textvqa", ["34602", "34603"], "what is 0?", _ten("red", "blue")),
        ("pope", [f"{c}/{n}" for c in ("random", "popular", "adversarial") for n in (1, 2)],
         "Is there a dog in the image?", ["yes"]),
        ("mme", [f"{task}/7/{n}" for task in vqa_tasks()[:-1] for n in (1, 2)], "Is it a dog?",
         ["yes"]),
        ("mmbench", ["241", "1000241"], "look\nwhich one is\nit?\nA. a cat\nB. a dog", ["B"]),
    ],
)  # fmt: skip
def test_the_makers_files_are_read(tmp_path, name, ids, text, references):
    WRITERS[name](tmp_path)
    asked = benchmarks.read(name, tmp_path, partial=True)
    assert [q.id for q in asked] == ids
    assert asked[0].text == text and list(asked[0].references) == references
    pictures = files.Pictures([q.image for q in asked], 8)
    assert pictures[:].shape == (len(ids), 8, 8, 3)
    with pytest.raises(files.DatasetError, match=rf"found {len(ids)} questions where the protocol"):
        benchmarks.read(name, tmp_path)


def test_every_benchmark_says_what_belongs_where(tmp_path):
    assert set(WRITERS) == set(benchmarks.BENCHMARKS)
    for name, one in benchmarks.BENCHMARKS.items():
        with pytest.raises(files.DatasetError) as caught:
            benchmarks.read(name, tmp_path)
        assert f"put {one.layout} below {tmp_path}" in str(caught.value)
    with pytest.raises(files.DatasetError, match="unknown data set 'gqa2'; there are vqav2"):
        benchmarks.read("gqa2", tmp_path)


def test_what_does_not_fit_together_is_refused(tmp_path):
    _vqav2(tmp_path)
    file = tmp_path / "vqav2/v2_mscoco_val2014_annotations.json"
    annotations = json.loads(file.read_text())
    file.write_text(json.dumps({"annotations": annotations["annotations"][:1]}))
    with pytest.raises(files.DatasetError, match="no answers to 1 of 2 questions, the first 42000"):
        benchmarks.read("vqav2", tmp_path, partial=True)
    file.write_text(json.dumps([]))
    with pytest.raises(files.DatasetError, match="not as they are published: TypeError"):
        benchmarks.read("vqav2", tmp_path, partial=True)
    _textvqa(tmp_path)
    next((tmp_path / "textvqa/train_images").iterdir()).unlink()
    with pytest.raises(files.DatasetError, match="1 of 1 picture files are missing"):
        benchmarks.read("textvqa", tmp_path, partial=True)
    _mme(tmp_path)
    (tmp_path / "mme/MME_Benchmark_release_version/count/7.jpg").unlink()
    with pytest.raises(files.DatasetError, match=r"count/7.txt has no picture of its name"):
        benchmarks.read("mme", tmp_path, partial=True)


def test_own_lines_come_before_the_makers_files(tmp_path):
    _gqa(tmp_path)
    line = {"question_id": 1, "image": "images/n161313.jpg", "question": "?", "answer": "red"}
    _write(tmp_path, "gqa/questions.jsonl", json.dumps(line))
    (only,) = benchmarks.read("gqa", tmp_path, partial=True)
    assert (only.id, only.references) == ("1", ("red",))
    _write(tmp_path, "gqa/questions.jsonl", f"{json.dumps(line)}\n{json.dumps(line)}")
    with pytest.raises(files.DatasetError, match="1 ids are repeated, the first 1"):
        benchmarks.read("gqa", tmp_path, partial=True)
    _write(tmp_path, "gqa/questions.jsonl", f"{json.dumps(line)}\n{{}}")
    with pytest.raises(files.DatasetError, match=r"jsonl:2: not a question: KeyError"):
        benchmarks.read("gqa", tmp_path, partial=True)


def test_a_choice_must_be_right_in_every_order(tmp_path):
    _mmbench(tmp_path)
    asked = benchmarks.read("mmbench", tmp_path, partial=True)
    assert vqa.score("choice", asked, ["B", "A"]) == {"accuracy": 1.0, "each": 1.0}
    assert vqa.score("choice", asked, ["B", "B"]) == {"accuracy": 0.0, "each": 0.5}


def _command(capsys, *words):
    cli.main(["evaluate", *words])
    return dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())


def test_answers_from_elsewhere_are_scored_without_a_model(tmp_path, capsys):
    for writer in WRITERS.values():
        writer(tmp_path)
    given = [{"question_id": 42000 + n, "answer": word} for n, word in ((1, "Blue."), (0, "red"))]
    _write(tmp_path, "vqa.json", given)
    lines = [{"questionId": f"20100{n}", "prediction": "the blue"} for n in range(2)]
    _write(tmp_path, "gqa.jsonl", "\n".join(map(json.dumps, lines)))
    words = [f"--predictions=vqav2:{tmp_path / 'vqa.json'},gqa:{tmp_path / 'gqa.jsonl'}",
             f"--data={tmp_path}", "--partial"]  # fmt: skip
    # "red" is what one of ten said: nine of the ten sets without one person have it, 1/3 each.
    found = _command(capsys, *words, f"--json={tmp_path / 'out.json'}")
    assert found == {"vqa.vqav2.accuracy": "65.00", "vqa.gqa.accuracy": "100.00"}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["published"]["vqa.gqa.accuracy"]["Chat 13B MLP"] == 63.9
    (tmp_path / COCO).unlink()  # pictures are not asked for
    assert _command(capsys, *words)["vqa.vqav2.accuracy"] == "65.00"


def test_captions_from_elsewhere_are_scored_by_the_pictures_names(tmp_path, capsys):
    """COCO's numbers, Flickr's file names, NoCaps' own numbers: what their result files have."""
    captions = [["a red star above a ring", "a star"], ["one blue cross here", "a blue cross"]]
    karpathy = [
        {"filename": f"COCO_val2014_{n:012d}.jpg", "filepath": "val2014", "cocoid": n,
         "split": "test", "sentences": [{"raw": c} for c in own]}
        for n, own in zip((7, 42), captions, strict=True)
    ]  # fmt: skip
    _write(tmp_path, "coco/dataset_coco.json", {"images": karpathy})
    for record in karpathy:
        del record["cocoid"], record["filepath"]
        record["filename"] = f"{record['filename'][-7:]}"
    _write(tmp_path, "flickr30k/dataset_flickr30k.json", {"images": karpathy})
    images = [{"id": n, "file_name": f"0013ea2087{n}.jpg"} for n in range(2)]
    annotations = [{"image_id": n, "caption": c} for n, own in enumerate(captions) for c in own]
    _write(tmp_path, "nocaps/nocaps_val_4500_captions.json",
           {"images": images, "annotations": annotations})  # fmt: skip
    names = {"coco_caption": (7, 42), "flickr30k_caption": ("007", "042"), "nocaps": (0, 1)}
    for name, ids in names.items():
        given = [{"image_id": i, "caption": own[0]} for i, own in zip(ids, captions, strict=True)]
        _write(tmp_path, "given.json", given[::-1])
        words = [f"--predictions={name}:{tmp_path / 'given.json'}", f"--data={tmp_path}"]
        cli.main(["evaluate", *words, "--partial"])
        printed = capsys.readouterr().out
        found = dict(line.split()[:2] for line in printed.splitlines())
        assert found[f"captioning.{name}.en.bleu1"] == "100.00"
        assert "captioning: words split by this project" in printed
    _write(tmp_path, "given.json", given[:1])
    with pytest.raises(files.DatasetError, match=r"the 2 pictures: ids 1 missing .first: 1."):
        predictions.score("nocaps", tmp_path / "given.json", tmp_path, partial=True)
    with pytest.raises(files.DatasetError, match=r"unknown data set 'coco'; there are vqav2, "):
        predictions.score("coco", tmp_path / "given.json", tmp_path)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ([{"question_id": 42000, "answer": "a"}], 1, "ids 1 missing (first: 42001)"),
        ([{"question_id": 42000, "answer": "a"}] * 2, 1,
         "ids 1 missing (first: 42001), 1 repeated (first: 42000)"),
        ([{"question_id": 42000}], 1, "record 1: it has none of answer, prediction, text"),
        ("{]", 1, "is neither a JSON list nor lines of JSON"),
    ],
)  # fmt: skip
def test_predictions_that_do_not_fit_are_one_line(tmp_path, capsys, content, code, message):
    _vqav2(tmp_path)
    _write(tmp_path, "given.json", content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", f"--predictions=vqav2:{tmp_path / 'given.json'}",
                  f"--data={tmp_path}", "--partial"])  # fmt: skip
    printed = capsys.readouterr().err
    assert caught.value.code == code and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--predictions=answers.json"], "write SET:FILE"),
        (["--predictions=gqa:a.json", "--evals=vqa"], "--evals is for a model"),
        (["--predictions=gqa:a.json", "--checkpoint=demo"], "not allowed with"),
        ([], "one of the arguments --checkpoint --predictions is required"),
    ],
)
def test_a_model_or_predictions(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", *words])
    assert caught.value.code == 2 and message in capsys.readouterr().err
