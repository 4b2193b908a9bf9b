"""Index lists, the official meta file, and folders of classes."""

import json
import pickle

import numpy as np
import pytest

from internvl_jax.data import sources
from internvl_jax.data.sources import folder


def test_index_list_selects_records(tmp_path, make):
    pattern = make.shards(tmp_path, 2, 5)
    np.save(tmp_path / "keep.npy", np.array([8, 1, 3], np.uint32))
    source = sources.open_source(f"webdataset:{pattern}?keep={tmp_path}/keep.npy")
    assert len(source) == 3
    assert [source.texts(i)["captions"]["en"][0] for i in range(3)] == [
        "picture 8", "picture 1", "picture 3",
    ]
    assert "00001.tar: record 3" in source.place(0)
    assert pickle.loads(pickle.dumps(source)).identity == source.identity
    np.save(tmp_path / "keep.npy", np.array([8, 1, 4], np.uint32))
    renewed = sources.open_source(f"webdataset:{pattern}?keep={tmp_path}/keep.npy")
    assert renewed.identity != source.identity


@pytest.mark.parametrize(
    "content, message",
    [
        (np.array([0, 10]), "names record 10, but .* has 10"),
        (np.array([0.5]), "must hold a list of integers"),
        (np.zeros((2, 2), int), "must hold a list of integers"),
        (None, "no index list at"),
    ],
)
def test_index_lists_that_do_not_fit(tmp_path, make, content, message):
    if content is not None:
        np.save(tmp_path / "keep.npy", content)
    with pytest.raises(ValueError, match=message):
        sources.open_source(f"webdataset:{make.shards(tmp_path, 1, 10)}?keep={tmp_path}/keep.npy")


def chats(path, *answers):
    lines = [
        {"image": "a.jpg", "conversations": [
            {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]}
        for answer in answers
    ]
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")


@pytest.fixture
def meta(tmp_path, make):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(make.picture(1))
    chats(tmp_path / "one.jsonl", "a", "b", "c", "d")
    chats(tmp_path / "two.jsonl", "x", "y")
    entry = {"root": "images", "data_augment": False}
    content = {
        "one": {**entry, "annotation": "one.jsonl", "repeat_time": 0.5, "length": 4},
        "two": {**entry, "annotation": str(tmp_path / "two.jsonl"), "repeat_time": 2, "length": 2},
    }
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(content))
    return path, content


def test_meta_file_repeats_its_data_sets(meta):
    source = sources.open_source(f"chat:{meta[0]}")
    assert [source.texts(i)["rounds"][0][1] for i in range(len(source))] == list("abxyxy")
    assert source.image(5).shape == (30, 40, 3) and "two.jsonl:2" in source.place(5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": 5}, 'data set \'one\' has "length" 5, but its annotation has 4 records'),
        ({"annotation": None}, "data set 'one' has no \"annotation\""),
        ({"annotation": "gone.jsonl"}, "no data file at .*gone.jsonl"),
        ({"repeat_time": 0}, '"repeat_time" 0, not positive'),
    ],
)
def test_meta_files_that_are_wrong(meta, change, message):
    path, content = meta
    content["one"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        sources.open_source(f"chat:{path}")


def test_class_folders(tmp_path, make):
    for name, count in (("n02", 2), ("n01_cat", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for n in range(count):
            (tmp_path / "data" / name / f"{n}.JPEG").write_bytes(make.picture(n))
        (tmp_path / "data" / name / "notes.txt").write_text("x")
    source = sources.open_source(sources.spec_of(f"{tmp_path}/data"))
    assert [source.texts(i)["class_index"] for i in range(3)] == [0, 1, 1]
    assert source[0]["captions"] == {"en": ("a photo of a n01 cat",)}
    assert source[2]["image"].shape == (30, 40, 3)
    (tmp_path / "names.txt").write_text("tabby cat\ngoldfish\n")
    named = sources.open_source(f"folder:{tmp_path}/data?names={tmp_path}/names.txt")
    assert named[1]["captions"] == {"en": ("a photo of a goldfish",)}
    assert named.identity != source.identity
    (tmp_path / "names.txt").write_text("tabby cat\n")
    with pytest.raises(ValueError, match=r"has 1 names, but .* has 2 folders"):
        sources.open_source(f"folder:{tmp_path}/data?names={tmp_path}/names.txt")


def test_class_folders_of_many_names_are_mapped(tmp_path, make, monkeypatch):
    for number in range(7):
        (tmp_path / "data" / f"n{number}").mkdir(parents=True)
        for n in range(5 * number):
            (tmp_path / "data" / f"n{number}" / f"{n}.jpg").write_bytes(b"")
    (tmp_path / "data" / "n6" / "3.jpg").write_bytes(make.picture(3))
    few = sources.ImageFolder(tmp_path / "data")
    monkeypatch.setattr(folder, "KEPT_FROM", 1)
    for _ in range(2):  # listed, then found in the cache folder
        many = sources.ImageFolder(tmp_path / "data")
        copy = pickle.loads(pickle.dumps(many))
        assert len(pickle.dumps(many)) < 2000
        for source in (many, copy):
            assert source.identity == few.identity and len(source) == 105
            assert [source.place(n) for n in range(105)] == [few.place(n) for n in range(105)]
            assert source.texts(104) == few.texts(104) and source.texts(0)["class_index"] == 1
    assert many.image(75 + 23).shape == (30, 40, 3)  # as text, 3 comes after 29
    (tmp_path / "data" / "n0" / "new.jpg").write_bytes(b"")
    assert len(sources.ImageFolder(tmp_path / "data")) == 106
