"""Packed rows: what they hold, and that they depend on the data, the seed and the step alone."""

import contextlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import conversation, inspection, packing, pipelines, sources
from internvl_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
LENGTH = 256


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """96 conversations of different lengths: with an image, with two, or with text alone."""
    folder = tmp_path_factory.mktemp("chat")
    rng = np.random.default_rng(0)
    for n in range(8):
        pixels = rng.integers(0, 256, (16, 16 * (1 + n % 3), 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    lines = []
    for n in range(96):
        images = [[], [f"{n % 8}.png"], [f"{n % 8}.png", f"{(n + 1) % 8}.png"]][n % 3]
        question = "<image> " * len(images) + f"what is number {n} "
        turns = []
        for turn in range(1 + n % 4):
            turns += [{"from": "human", "value": question if turn == 0 else "and then?"},
                      {"from": "gpt", "value": f"it is {n} " * int(rng.integers(1, 4))}]
        record = {"conversations": turns} | ({"image": images} if images else {})
        lines.append(json.dumps(record))
    (folder / "chat.jsonl").write_text("\n".join(lines), "utf-8")
    return f"jsonl:{folder}/chat.jsonl"


def build(records, **changes):
    options = dict(
        task="instruct", sources=((records, 1.0),), batch_size=8, image_size=16,
        text_length=LENGTH, seed=3, tokenizer=TOKENIZER, template="brief", num_image_tokens=4,
        max_tiles=2, packing=3,
    )
    return pipelines.build(**options | changes)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def names_in(ids):
    """The ids of the conversations of rows, of which some may be empty."""
    return [name for row in ids for name in row.split("+") if name]


def conversations(batch):
    """(tokens, labels, squares) of every conversation of a packed batch."""
    for row in range(len(batch["tokens"])):
        at = 0
        for number in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == number
            tokens = batch["tokens"][row][here]
            squares = int((tokens == conversation.IMAGE_TOKEN).sum()) // 4
            yield tokens, batch["labels"][row][here], batch["image"][row][at : at + squares]
            at += squares


def test_rows_hold_the_conversations_that_rows_of_their_own_would(records):
    packed, alone = build(records), build(records, packing=0, batch_size=24)
    rows = {}
    batch = alone.batch(0)
    for row, name in enumerate(alone.ids(0)):
        rows[name] = {field: batch[field][row] for field in batch}
    found = list(conversations(packed.batch(0)))
    names = names_in(packed.ids(0))
    assert len(found) == len(names) == 24 and set(names) == set(rows)
    for name, (tokens, labels, squares) in zip(names, found, strict=True):
        row = rows[name]
        count = len(tokens)
        np.testing.assert_array_equal(row["tokens"][:count], tokens)
        np.testing.assert_array_equal(row["labels"][:count], labels)
        assert not row["tokens"][count:].any() and labels[0] == conversation.IGNORE
        np.testing.assert_array_equal(row["image"][: len(squares)], squares)


def test_padding_follows_the_conversations(records):
    batch = build(records).batch(1)
    padding = batch["segments"] == 0
    assert padding.any() and (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert not batch["tokens"][padding].any() and batch["tokens"][~padding].all()
    assert (batch["labels"][padding] == conversation.IGNORE).all()
    assert batch["image"].shape == (8, 9, 16, 16, 3)


def test_an_epoch_holds_every_conversation_once_where_all_fit(records):
    pipeline = build(records)
    for epoch in range(2):
        names = [n for step in range(4) for n in names_in(pipeline.ids(4 * epoch + step))]
        assert sorted(names, key=lambda n: int(n[2:])) == [f"0:{n}" for n in range(96)]


def test_what_finds_no_room_is_left_out_and_told(records):
    pipeline = build(records, text_length=64, packing=4)
    figures = inspection.packing(pipeline.batches, steps=3)
    names = [n for step in range(3) for n in names_in(pipeline.ids(step))]
    assert len(names) == len(set(names)) == figures["conversations"]
    assert figures["left_out"] == pytest.approx(1 - len(names) / 96) and figures["left_out"] > 0
    assert figures["tokens_filled"] > 0.8 and figures["rows"] == 24
    shares = [(pipeline.batch(step)["tokens"] != 0).mean() for step in range(3)]
    assert figures["tokens_filled"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("workers, rows", [(0, range(8)), (2, range(4, 8)), (0, [1, 6])])
def test_resumed_by_other_workers_and_processes_equals_uninterrupted(records, workers, rows):
    whole = build(records)
    part = build(records, workers=workers, rows=rows)
    assert part.fingerprint == whole.fingerprint
    with contextlib.closing(part.iterate(start_step=2)) as reader:
        for step in (2, 3, 4):
            expected = whole.batch(step)
            same(next(reader), {name: x[list(rows)] for name, x in expected.items()})
            assert reader.ids == [whole.ids(step)[row] for row in rows]
    with contextlib.closing(part.iterate_ids(2)) as reader:
        next(reader)
        assert reader.ids == [whole.ids(2)[row] for row in rows]


def test_packing_is_part_of_the_fingerprint(records):
    prints = {build(records, packing=n).fingerprint for n in (0, 2, 3)}
    assert len(prints | {build(records, packed_squares=8).fingerprint}) == 4


def test_image_that_cannot_be_decoded_leaves_its_room(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(data[: len(data) - 200])  # the header is whole
    turns = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
    lines = [{"image": f"{'bad' if n == 5 else 'good'}.jpg", "conversations": turns}
             for n in range(16)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    pipeline = build(f"jsonl:{tmp_path}/x.jsonl", packing=2)
    batch, skipped, ids = pipeline.batches[0]
    assert [cause for _, cause, _ in skipped] == ["corrupt_image"]
    assert "x.jsonl:6" in skipped[0][0]
    used = names_in(ids)
    assert set(used) == {f"0:{n}" for n in range(16) if n != 5}
    assert len(list(conversations(batch))) == 15
    assert (batch["tokens"] != 0).sum() == (batch["segments"] != 0).sum()


def test_best_fit_packs_the_longest_run_that_fits():
    rng = np.random.default_rng(1)
    sizes = [(int(rng.integers(5, 60)), int(rng.integers(0, 2))) for _ in range(40)]
    placed = packing.pack(sizes, (100, 4), 8)
    items = sorted(itertools.chain.from_iterable(placed))
    assert items == list(range(len(items))) and 8 < len(items) < 40
    for row in placed:
        assert sum(sizes[n][0] for n in row) <= 100 and sum(sizes[n][1] for n in row) <= 4
    assert sum(sizes[n][0] for n in items) > 0.9 * 8 * 100
    assert packing.pack([(100, 4)] * 3, (100, 4), 2) == [[0], [1]]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(task="contrastive"), "data.packing puts conversations together"),
        (dict(packed_squares=2), "packed_squares 2 is less than one conversation may need, 3"),
        (dict(packing=20), "a batch of 160 needs 160 different records"),
    ],
)
def test_mistakes(records, changes, message):
    with pytest.raises(ValueError, match=message):
        build(records, **changes)


def test_embedded_data_are_packed_as_well():
    small = sources.EmbeddedScenes("train", 300, 24)
    batch = build("", sources=((small, 1.0),), max_tiles=1, languages=("en",)).batch(0)
    assert (batch["segments"].max(axis=1) >= 2).all()
