"""WebDataset tars: the same records as the tarfile module gives, in any order, and damaged ones."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import files, sources
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import indexing, tar


def test_records_are_those_of_the_tarfile_module(tmp_path, make):
    source = sources.open_source(f"webdataset:{make.shards(tmp_path, 3, 5)}")
    assert len(source) == 15
    for index in (14, 0, 7):
        with tarfile.open(tmp_path / f"{index // 5:05d}.tar") as reference:
            name = f"{index // 5:05d}{index % 5:04d}"
            expected = reference.extractfile(f"{name}.jpg").read()
        assert source.image_in(index) == expected
        assert source.texts(index)["captions"] == {"en": (f"picture {index}",)}
        assert f"{index // 5:05d}.tar: record {index % 5} ({name}.jpg)" in source.place(index)
        np.testing.assert_array_equal(
            source.image(index), np.asarray(Image.open(io.BytesIO(expected)))
        )


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_folders_of_every_tar_format(tmp_path, layout, make):
    folder = "a" * 60 + "/" + "b" * 50
    stem = f"{folder}/{'c' * 60}" if layout != tarfile.USTAR_FORMAT else f"{folder}/c"
    stem += "ü" if layout == tarfile.PAX_FORMAT else ""
    with tarfile.open(tmp_path / "x.tar", "w", format=layout) as archive:
        for ending, data in ((".jpg", make.picture(1)), (".TXT", b"one")):
            info = tarfile.TarInfo(stem + ending)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("folder"))
    names = [name for name, *_ in tar.members(str(tmp_path / "x.tar"), [])]
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert names == archive.getnames()
    source = sources.WebDataset(str(tmp_path / "x.tar"))
    assert len(source) == 1 and source[0]["captions"] == {"en": ("one",)}


def test_captions_from_metadata(tmp_path, make):
    about = {"caption": "plain", "caption_long": "a longer one", "image_id": 7}
    make.tar(
        tmp_path / "x.tar",
        [("1.png", make.picture(1, "PNG")), ("1.json", json.dumps(about).encode())],
    )
    assert sources.WebDataset(f"{tmp_path}/x.tar").texts(0)["captions"] == {"en": ("plain",)}
    longer = sources.open_source(f"webdataset:{tmp_path}/x.tar?caption=caption_long&language=zh")
    assert longer.texts(0)["captions"] == {"zh": ("a longer one",)}
    with pytest.raises(ValueError, match="webdataset takes language, caption, keep"):
        sources.open_source(f"webdataset:{tmp_path}/x.tar?lang=zh")


def test_nothing_is_written_outside_and_odd_members_are_left_out(tmp_path, make):
    path = tmp_path / "data" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../evil.jpg", "/etc/evil.jpg", "1.jpg", "1.jpg", "2.jpg", "1.txt"):
            data = make.picture(1) if name.endswith("jpg") else b"one"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = sources.WebDataset(str(path))
    causes = sorted(cause for _, cause, _ in source.index.problems)
    assert causes == ["duplicate_name", "duplicate_name", "link", "unsafe_name", "unsafe_name"]
    assert sorted(os.listdir(tmp_path)) == ["data"] and os.listdir(path.parent) == ["x.tar"]
    assert len(source) == 3  # "1", "2", and the caption that comes too late to belong to "1"


def test_truncated_tar_gives_what_is_whole(tmp_path, make):
    make.shards(tmp_path, 1, 6)
    path = tmp_path / "00000.tar"
    whole = sources.WebDataset(str(path))
    end = int(whole.index.rows[4]["image_at"]) + 100
    os.truncate(path, end)
    source = sources.WebDataset(str(path))
    assert len(source) == 5 and source.texts(3)["captions"] == {"en": ("picture 3",)}
    with pytest.raises(RecordError, match=r"00000.tar: record 4 \(.*the tar ends inside") as caught:
        source.image(4)
    assert caught.value.cause == "truncated"
    assert source.identity != whole.identity


def test_damaged_header_is_told(tmp_path, make):
    make.shards(tmp_path, 1, 6)
    path = tmp_path / "00000.tar"
    at = int(sources.WebDataset(str(path)).index.rows[3]["image_at"]) - 512
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 300)
    source = sources.WebDataset(str(path))
    assert len(source) == 3 and source.index.problems[0][1] == "corrupt_record"


@pytest.mark.parametrize(
    "members, part, cause",
    [
        ([("1.jpg", b"x")], "texts", "missing_text"),
        ([("1.txt", b"x")], "image", "missing_image"),
        ([("1.jpg", b"x"), ("1.txt", b"\xff\xfe")], "texts", "invalid_text"),
        ([("1.jpg", b"x"), ("1.json", b"{")], "texts", "invalid_json"),
        ([("1.jpg", b"x"), ("1.json", b"[1]")], "texts", "invalid_json"),
        ([("1.jpg", b""), ("1.txt", b"a")], "image", "missing_image"),
        ([("1.jpg", b"no image"), ("1.txt", b"a")], "image", "corrupt_image"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, make, members, part, cause):
    source = sources.WebDataset(str(make.tar(tmp_path / "x.tar", members)))
    with pytest.raises(RecordError) as caught:
        getattr(source, part)(0)
    assert caught.value.cause == cause and str(caught.value).startswith(f"{tmp_path}/x.tar: ")


def test_index_is_kept_and_renewed(tmp_path, make, monkeypatch):
    pattern = make.shards(tmp_path, 2, 4)
    before = sources.open_source(f"webdataset:{pattern}")
    assert indexing.build(f"webdataset:{pattern}", workers=2) == (2, 8)
    assert (tmp_path / "00001.tar.idx.npz").is_file()
    kept = sources.open_source(f"webdataset:{pattern}")
    assert isinstance(kept.index.rows, np.memmap) and kept.identity == before.identity
    copy = pickle.loads(pickle.dumps(kept))
    assert isinstance(copy.index.rows, np.memmap) and copy.image_in(6) == kept.image_in(6)
    # What has changed since is scanned again; a damaged index too.
    make.tar(tmp_path / "00001.tar", [("9.jpg", make.picture(9)), ("9.txt", b"nine")])
    (tmp_path / "00000.tar.idx.npz").write_bytes(b"damaged")
    renewed = sources.open_source(f"webdataset:{pattern}")
    assert len(renewed) == 5 and renewed.texts(4)["captions"] == {"en": ("nine",)}


def test_index_of_a_folder_that_cannot_be_written_lies_in_the_cache(tmp_path, make, monkeypatch):
    pattern = make.shards(tmp_path, 1, 2)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    indexing.build(f"webdataset:{pattern}")
    assert os.listdir(tmp_path) == ["00000.tar"]
    assert len(list(files.cache_folder().glob("*.idx.npz"))) == 1


def test_the_same_records_through_an_address(tmp_path, make):
    import fsspec

    make.shards(tmp_path, 2, 3)
    memory = fsspec.filesystem("memory")
    for name in ("00000.tar", "00001.tar"):
        memory.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    local = sources.open_source(f"webdataset:{tmp_path}/*.tar")
    for pattern in ("memory://shards/{00000..00001}.tar", "memory://shards/*.tar"):
        remote = sources.open_source(f"webdataset:{pattern}")
        assert remote.identity == local.identity
        assert [remote.image_in(i) for i in range(6)] == [local.image_in(i) for i in range(6)]


def test_patterns():
    assert files.expand("a-{08..11}.tar") == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert files.expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert files.expand("x.tar::y-{0..1}.tar") == ["x.tar", "y-0.tar", "y-1.tar"]
    with pytest.raises(ValueError, match="no files match /nowhere"):
        files.expand("/nowhere/*.tar")
