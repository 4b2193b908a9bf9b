"""Batches: a pure function of data, seed and step, for any number of processes."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import conversation, pipelines, scenes, sources, stream, text
from internvl_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def build(task="contrastive", **changes):
    small = sources.EmbeddedScenes("train", 300, 24), sources.EmbeddedDigits("train", 24)
    options = dict(
        task=task,
        sources=((small[0], 0.75), (small[1], 0.25)),
        batch_size=16,
        image_size=24,
        text_length=40,
        seed=5,
        tokenizer=TOKENIZER,
    )
    if task == "instruct":
        options |= {"template": "brief", "num_image_tokens": 9}
    return pipelines.build(**options | changes)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def decoded(rows):
    return [TOKENIZER.decode(row) for row in rows]


MATCHING = {"image", "text", "positive", "negative", "image_id"}
FIELDS = {
    "language": {"tokens"},
    "contrastive": {"image", "text"},
    "generative": MATCHING | {"caption", "caption_labels"},
    "retrieval": MATCHING,
    "instruct": {"image", "tokens", "labels"},
}


@pytest.mark.parametrize("task", pipelines.TASKS)
def test_fields_shapes_and_types(task):
    batch = build(task).batch(0)
    assert set(batch) == FIELDS[task]
    for name, array in batch.items():
        if name == "image":
            assert array.dtype == np.uint8
            assert array.shape == ((16, 1, 24, 24, 3) if task == "instruct" else (16, 24, 24, 3))
        elif name == "image_id":
            assert array.shape == (16,) and array.dtype == np.int32 and (array >= 0).all()
        else:
            assert array.shape == (16, 40) and array.dtype == np.int32
            padding = conversation.IGNORE if "labels" in name else 0
            assert (array[:, -1] == padding).all()


@pytest.mark.parametrize("task", pipelines.TASKS)
def test_resumed_equals_uninterrupted(task):
    with contextlib.closing(build(task).iterate()) as whole:
        batches = [next(whole) for _ in range(9)]
    with contextlib.closing(build(task).iterate(start_step=5)) as resumed:
        for step in range(5, 9):
            same(next(resumed), batches[step])
    same(build(task).batch(8), batches[8])


@pytest.mark.parametrize("rows", [range(8), range(12, 16), [0, 1, 8, 9]])
def test_rows_are_those_of_the_whole_batch(rows):
    whole, part = build(), build(rows=rows)
    assert part.fingerprint == whole.fingerprint
    for step in (0, 3, 40):
        same(part.batch(step), {name: x[list(rows)] for name, x in whole.batch(step).items()})
    with contextlib.closing(part.iterate(start_step=3)) as iterator:
        same(next(iterator), part.batch(3))


def test_seed_and_step_change_the_batch():
    texts = [build(seed=seed).batch(step)["text"] for seed in (1, 2) for step in (0, 1)]
    assert len({array.tobytes() for array in texts}) == 4


def test_an_epoch_shows_every_record_once_in_a_new_order():
    source = sources.EmbeddedScenes("train", 48, 24)
    pipeline = build(sources=((source, 1.0),))
    records = {image.tobytes(): i for i, image in enumerate(source.images)}
    orders = [
        [
            records[image.tobytes()]
            for step in range(3)
            for image in pipeline.batch(first + step)["image"]
        ]
        for first in (0, 3)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(48))
    assert orders[0] != orders[1] and orders[0] != list(range(48))


def test_every_batch_holds_the_weighted_mixture():
    pipeline = build()
    digits = {image.tobytes() for image in sources.EmbeddedDigits("train", 24).images}
    for step in range(6):
        assert sum(image.tobytes() in digits for image in pipeline.batch(step)["image"]) == 4


def test_all_languages_and_only_the_chosen_ones_occur():
    def languages(pipeline):
        found = set()
        for sentence in (s for step in range(4) for s in decoded(pipeline.batch(step)["text"])):
            letters = sentence.removeprefix("summarize:")
            if any("가" <= c <= "힣" for c in letters):
                found.add("ko")
            elif any("一" <= c <= "鿿" for c in letters):
                found.add("zh")
            else:
                found.add("es" if letters.startswith(("un", "hay", "el")) else "en")
        return found

    assert languages(build()) == set(text.LANGUAGES)
    assert languages(build(languages=("zh", "es"))) == {"zh", "es"}


def test_captions_belong_to_their_images():
    source = sources.EmbeddedScenes("train", 300, 24)
    batch = build("generative", sources=((source, 1.0),)).batch(2)
    records = {image.tobytes(): i for i, image in enumerate(source.images)}
    captions = [source.texts(records[image.tobytes()])["captions"] for image in batch["image"]]
    own = [{c for group in record.values() for c in group} for record in captions]
    rows = zip(
        own,
        decoded(batch["text"]),
        decoded(batch["positive"]),
        decoded(batch["negative"]),
        decoded(batch["caption"]),
        strict=True,
    )
    for mine, summary, positive, negative, written in rows:
        assert positive in mine and summary == f"summarize:{positive}"
        assert negative not in mine
        prompt, _, caption = written.partition("caption: ")
        code = {name: code for code, name in text.LANGUAGE_NAMES.items()}[prompt.strip()]
        assert caption == positive and code in text.LANGUAGES
    assert len(set(decoded(batch["negative"]))) > 8


def test_retrieval_ids_mark_images_that_read_alike():
    source = sources.EmbeddedScenes("train", 300, 24)
    pipeline = build("retrieval", languages=("en",))
    described = {}
    for step in range(20):
        batch = pipeline.batch(step)
        for number, image in zip(batch["image_id"], batch["image"], strict=True):
            described.setdefault(int(number), set()).add(image.tobytes())
    records = {
        image.tobytes(): s.description
        for image, s in zip(source.images, source.scenes, strict=True)
    }
    groups = [{records.get(i, "digit") for i in images} for images in described.values()]
    assert all(len(group) == 1 for group in groups)
    assert any(len(images) > 1 for images in described.values())


@pytest.mark.parametrize("template", ["vicuna_v1", "brief", "plain"])
def test_instruct_learns_only_answers(template):
    pipeline = build("instruct", template=template, text_length=80)
    batch = pipeline.batch(1)
    ids, labels = batch["tokens"], batch["labels"]
    assert ((ids == conversation.IMAGE_TOKEN).sum(1) == 9).all()
    kept = labels != conversation.IGNORE
    np.testing.assert_array_equal(labels[kept], ids[kept])
    for row, row_ids in zip(labels, ids, strict=True):
        answer = row[row != conversation.IGNORE]
        whole = TOKENIZER.decode(row_ids)
        if template == "plain":
            assert whole.endswith(TOKENIZER.decode(answer)) and whole.endswith("\n")
        else:
            assert answer[-1] == TOKENIZER.eos_id
            assert whole.split("ASSISTANT: ")[1] == TOKENIZER.decode(answer)


def test_instruct_asks_several_questions_about_one_image():
    pipeline = build("instruct", rounds=3, text_length=80)
    for row in decoded(pipeline.batch(0)["tokens"]):
        assert row.count("ASSISTANT:") == 3 and len(set(row.split("USER: "))) == 4


def test_augmentation_is_repeatable_and_changes_pictures():
    plain, cropped = build(), build(augment="random_resized_crop")
    assert plain.fingerprint != cropped.fingerprint
    same(cropped.batch(3), build(augment="random_resized_crop").batch(3))
    assert not (plain.batch(3)["image"] == cropped.batch(3)["image"]).all((1, 2, 3)).any()


def test_flipping_mirrors_about_half_of_the_cropped_images():
    cropped = build(augment="random_resized_crop", batch_size=64).batch(3)["image"]
    flipped = build(augment="random_resized_crop_and_flip", batch_size=64).batch(3)["image"]
    kept = (flipped == cropped).all((1, 2, 3))
    mirrored = (flipped == cropped[:, :, ::-1]).all((1, 2, 3))
    assert (kept | mirrored).all() and 16 < (mirrored & ~kept).sum() < 48


def test_fingerprint_follows_everything_that_decides_the_batches():
    source = sources.EmbeddedScenes("train", 300, 24)
    variants = [
        build(),
        build(seed=6),
        build(batch_size=8),
        build(languages=("en",)),
        build("generative"),
        build(sources=((source, 1.0),)),
        build(sources=((sources.EmbeddedScenes("train", 301, 24), 1.0),)),
    ]
    assert len({pipeline.fingerprint for pipeline in variants}) == len(variants)
    assert build().fingerprint == build().fingerprint


@pytest.fixture
def user_file(tmp_path):
    lines = []
    for i, color in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (30, 20), color).save(tmp_path / f"{i}.png")
        turns = [
            {"from": "human", "value": "what color? <image>"},
            {"from": "gpt", "value": color},
            {"from": "human", "value": "sure?"},
            {"from": "gpt", "value": "yes"},
        ]
        lines.append({"image": f"{i}.png", "caption": f"All {color}!", "conversations": turns})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_user_data_goes_through_every_task(user_file):
    options = dict(sources=((f"jsonl:{user_file}", 1.0),), batch_size=4, languages=("en",))
    contrastive = build(**options).batch(0)
    assert set(decoded(contrastive["text"])) == {
        f"summarize:all {color}" for color in ("red", "green", "blue", "white")
    }
    assert contrastive["image"].shape == (4, 24, 24, 3)
    generative = build("generative", **options).batch(0)
    assert (generative["positive"] != generative["negative"]).any(1).all()
    chat = build("instruct", **options).batch(0)
    for row in decoded(chat["tokens"]):
        first, second = row.split("ASSISTANT: ")[1:]
        assert row.startswith("USER: ") and "what color?" in row
        assert first.split(" ")[0] in ("red", "green", "blue", "white") and second == "yes"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "captioning"}, "unknown task 'captioning'; choose one of language"),
        ({"augment": "flip"}, "unknown augment 'flip'"),
        ({"languages": ("en", "fr")}, "unknown language 'fr'"),
        ({"languages": ()}, "languages is empty"),
        ({"template": "v9"}, "unknown chat template 'v9'"),
        ({"sources": ()}, "no data sources"),
        ({"sources": (("scenes", 0),)}, "weight of a data source must be positive"),
        ({"batch_size": 12000}, "a batch of 12000 needs 9000 different records .* has 300"),
        ({"task": "instruct", "text_length": 20}, "leaves no room for a conversation"),
    ],
)
def test_mistakes_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_empty_data_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"the data source has no records: jsonl empty.jsonl"):
        build(sources=((f"jsonl:{tmp_path}/empty.jsonl", 1.0),))


def test_matching_needs_different_captions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = json.dumps({"image": "a.png", "caption": "the same"})
    (tmp_path / "data.jsonl").write_text("\n".join([line] * 4))
    pipeline = build("generative", sources=((f"jsonl:{tmp_path}/data.jsonl", 1.0),), batch_size=4)
    with pytest.raises(ValueError, match="found no second caption in 'en'"):
        pipeline.batch(0)


def test_errors_of_records_reach_the_training_loop(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"image": "gone.png", "caption": "x"}\n' * 4)
    pipeline = build(sources=((f"jsonl:{tmp_path}/data.jsonl", 1.0),), batch_size=4)
    with (
        contextlib.closing(pipeline.iterate()) as batches,
        pytest.raises(stream.StreamError, match=r"in a row .*data.jsonl:\d: .*gone.png"),
    ):
        next(batches)


def test_held_out_pairs_appear_in_no_training_text():
    names = [text.noun(*pair, None, "en", article=False) for pair in scenes.UNSEEN_PAIRS]
    for task, field in (("language", "tokens"), ("generative", "negative"), ("instruct", "tokens")):
        pipeline = build(task, languages=("en",), text_length=64)
        said = " ".join(s for step in range(10) for s in decoded(pipeline.batch(step)[field]))
        assert not any(name in said for name in names)
