"""Lists of images in JSON Lines, JSON and CSV, with the images in a folder."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import sources
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import index


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.arange(10 * 12 * 3, dtype=np.uint8).reshape(10, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


CHAT = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


def test_jsonl_examples(folder):
    path = write(
        folder,
        {"image": "images/a.png", "caption": "A cat."},
        "",
        {"image": "images/a.png", "caption": {"en": ["a cat", "one cat"], "zh": "一只猫"}},
        {"image": "images/a.png", "conversations": CHAT},
    )
    source = sources.JsonlImages(path)
    assert len(source) == 3
    assert source[0]["image"].shape == (10, 12, 3)
    assert source[0]["captions"] == {"en": ("A cat.",)}
    assert source[1]["captions"] == {"en": ("a cat", "one cat"), "zh": ("一只猫",)}
    assert source[2]["rounds"] == (("<image>\nwhat?", "a cat"),)
    assert source[0]["image_id"] == source[2]["image_id"]
    assert sources.JsonlImages(path, language="fr").texts(0)["captions"] == {"fr": ("A cat.",)}


def test_jsonl_identity_follows_the_content(folder):
    path = write(folder, {"image": "images/a.png", "caption": "a cat"})
    before = sources.JsonlImages(path).identity
    assert sources.JsonlImages(path).identity == before
    write(folder, {"image": "images/a.png", "caption": "a dog"})
    assert sources.JsonlImages(path).identity != before


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "images/a.png", "caption": ', "not valid JSON: "),
        ("[1, 2]", 'must be an object with an "image" path'),
        ({"caption": "x"}, 'must be an object with an "image" path'),
        ({"image": "images/a.png"}, 'neither "caption" nor "conversations"'),
        ({"image": "images/a.png", "caption": 3}, '"caption" must be a text'),
        ({"image": "images/a.png", "caption": {"en": [3]}}, '"caption" must be a text'),
        ({"image": "images/a.png", "conversations": CHAT[:1]}, '"conversations" must alternate'),
        ({"image": "images/a.png", "conversations": CHAT[::-1]}, '"conversations" must alternate'),
        ({"image": "images/no.png", "caption": "x"}, "No such file"),
        ({"image": "../secret.png", "caption": "x"}, "lies outside"),
        ({"image": "data.jsonl", "caption": "x"}, "cannot be read as an image"),
    ],
)
def test_jsonl_errors_name_file_and_line(folder, line, message):
    good = {"image": "images/a.png", "caption": "a cat"}
    source = sources.JsonlImages(write(folder, good, "", line))
    with pytest.raises(ValueError) as error:
        source[1]
    assert str(error.value).startswith(f"{folder / 'data.jsonl'}:3: ")
    assert message in str(error.value)


def test_sources_by_name(folder):
    assert sources.open_source("scenes", 16).identity.startswith("scenes v1 train 12000 at 16")
    assert sources.open_source("scenes/test", 16).split == "test"
    assert len(sources.open_source("digits/test", 16)) == 360
    path = write(folder, {"image": "images/a.png", "caption": "a cat"})
    assert len(sources.open_source(f"jsonl:{path}", 16)) == 1
    with pytest.raises(ValueError, match="unknown data source 'coco'; use one of scenes, digits"):
        sources.open_source("coco", 16)
    with pytest.raises(ValueError, match="no data file at"):
        sources.open_source(f"jsonl:{folder}/absent.jsonl", 16)
    with pytest.raises(ValueError, match="unknown scene split 'dev'"):
        sources.open_source("scenes/dev", 16)


def paths(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_official_karpathy_list(folder):
    records = [
        {"caption": "a cat", "image": "images/a.png", "image_id": "coco_1"},
        {"caption": ["one", "two"], "image": "images/a.png", "image_id": "coco_2"},
    ]
    source = sources.open_source(f"json:{paths(folder, 'coco_karpathy_train.json', records)}")
    assert [source.texts(i)["captions"]["en"] for i in (0, 1)] == [("a cat",), ("one", "two")]
    assert source.texts(0)["image_id"] != source.texts(1)["image_id"]
    assert source.image(0).shape == (10, 12, 3)


def test_karpathy_splits(folder):
    images = [
        {"filepath": "images", "filename": "a.png", "split": split, "sentences": [{"raw": split}]}
        for split in ("train", "restval", "val", "test")
    ]
    path = paths(folder, "dataset_coco.json", {"images": images})
    said = {
        split: [x["captions"]["en"][0] for x in sources.JsonImages(path, split=split)]
        for split in ("train", "test")
    }
    assert said == {"train": ["train", "restval"], "test": ["test"]}


def test_coco_annotations(folder):
    content = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "b.png"}],
        "annotations": [{"image_id": 5, "caption": "x"}, {"image_id": 5, "caption": "y"}],
    }
    source = sources.open_source(
        f"json:{paths(folder, 'captions_val2014.json', content)}?root={folder}/images"
    )
    assert len(source) == 1 and source[0]["captions"] == {"en": ("x", "y")}
    assert source[0]["image"].shape == (10, 12, 3)


@pytest.mark.parametrize(
    "header, row",
    [
        ("image,caption", 'images/a.png,"two cats,\n""mine"""'),
        ("image_name| comment_number| comment", 'images/a.png| 0| "two cats,\n""mine"""'),
        ("filepath\ttitle", 'images/a.png\t"two cats,\n""mine"""'),
    ],
)
def test_csv_of_every_separator(folder, header, row):
    path = paths(folder, "flickr.csv", f"{header}\nimages/a.png{row[12:]}\n\n{row}\n")
    source = sources.open_source(f"csv:{path}")
    assert len(source) == 2 and source.place(1) == f"{path}:5"
    caption = source[1]["captions"]["en"][0]
    assert caption.replace('"', "").strip() == "two cats,\nmine"
    assert source[1]["image"].shape == (10, 12, 3)


def test_csv_mistakes(folder):
    with pytest.raises(ValueError, match="no column for the caption among image, words; name it"):
        sources.CsvImages(paths(folder, "a.csv", "image,words\nx,y\n"))
    with pytest.raises(ValueError, match="first line must be a header"):
        sources.CsvImages(paths(folder, "b.csv", ""))
    source = sources.CsvImages(paths(folder, "c.csv", "image,caption\nimages/a.png\n"))
    with pytest.raises(RecordError, match=r"c.csv:2: has 1 columns"):
        source.texts(0)


def test_text_alone_and_several_images_in_a_conversation(folder):
    two = ["images/a.png", "images/a.png"]
    lines = {"conversations": CHAT}, {"image": two, "conversations": CHAT}
    source = sources.JsonlImages(write(folder, *lines))
    assert source.image_in(0) is None and len(source.image_in(1)) == 2
    assert source.texts(0)["rounds"] == (("<image>\nwhat?", "a cat"),)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("a\x00b \u202eright to left 😀", "a\x00b \u202eright to left 😀"),
        ("x" * 1_000_000, "x" * 65_536),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
def test_strange_captions_are_kept_as_text(folder, text, kept):
    source = sources.JsonlImages(write(folder, {"image": "images/a.png", "caption": text}))
    assert source.texts(0)["captions"] == {"en": (kept,)}


def test_line_that_is_not_utf8(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b'{"image": "images/a.png", "caption": "\xff\xfe"}\n')
    with pytest.raises(RecordError, match=r"data.jsonl:1: not UTF-8") as caught:
        sources.JsonlImages(path).texts(0)
    assert caught.value.cause == "invalid_text"


def test_link_out_of_the_folder_is_not_followed(folder):
    (folder / "images" / "link.png").symlink_to("/etc/hostname")
    source = sources.JsonlImages(write(folder, {"image": "images/link.png", "caption": "x"}))
    with pytest.raises(RecordError, match="lies outside"):
        source.image(0)


def test_list_larger_than_what_is_held(folder, monkeypatch):
    """Of a JSON list only a block and a record are in memory, and of its index nothing."""
    monkeypatch.setattr(index, "CACHED_FROM", 1 << 20)
    path = folder / "long.json"
    filler = "x" * 300
    with path.open("w") as file:
        file.write("[\n")
        for n in range(60_000):
            record = {"image": "images/a.png", "caption": f"é {n}", "filler": filler}
            file.write((",\n" if n else "") + json.dumps(record, ensure_ascii=n % 2 == 0))
        file.write("\n]\n")
    tracemalloc.start()
    source = sources.JsonImages(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = path.stat().st_size
    assert size > 20e6 and peak < 0.5 * size and held < 0.05 * size
    assert isinstance(source.index.rows, np.memmap) and len(source) == 60_000
    for n in (0, 31_234, 59_999):
        assert source.texts(n)["captions"] == {"en": (f"é {n}",)}
    assert source.place(5) == f"{path}: record 5"
    assert pickle.loads(pickle.dumps(source)).texts(7) == source.texts(7)
    # Opened again it is what it was; changed, it is read anew.
    assert sources.JsonImages(path).identity == source.identity
    path.write_text(json.dumps([{"image": "images/a.png", "caption": "other"}]))
    assert sources.JsonImages(path).texts(0)["captions"] == {"en": ("other",)}


@pytest.mark.parametrize(
    "text", ['[{"image": ', "[1 2]", "[] []", "[,1]", '{"images": 3}', "[tru]", "", "[[1], 2"]
)
def test_broken_lists_are_refused(folder, text):
    with pytest.raises(ValueError, match=r"a\.json: not a list of images"):
        sources.JsonImages(paths(folder, "a.json", text))


def test_lists_of_every_spacing(folder):
    record = {"image": "images/a.png", "caption": "a ] , [ b"}
    for spacing in (dict(indent=2), dict(separators=(",", ":")), {}):
        text = json.dumps([record] * 3, **spacing)
        source = sources.JsonImages(paths(folder, "b.json", f" \n{text}\n"))
        assert len(source) == 3 and source.texts(2)["captions"] == {"en": ("a ] , [ b",)}
