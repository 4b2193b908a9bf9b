"""`internvl-jax data`: what its verbs print."""

import json

import pytest

from internvl_jax import cli

SOURCES = "--config.data.sources=((%r, 1.0),)"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    import io
    import tarfile

    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(16):
            file = io.BytesIO()
            Image.new("RGB", (20, 16), (n * 15, 0, 0)).save(file, "JPEG")
            for ending, data in (("jpg", file.getvalue()), ("txt", f"shade {n}".encode())):
                info = tarfile.TarInfo(f"{n}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"{tmp_path}/a.tar"


def printed(capsys, *words):
    cli.main(["data", *words])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_ids_of_every_step_and_process(shards, capsys):
    words = ["ids", "--config=stage1_contrastive:tiny", SOURCES % f"webdataset:{shards}", "--json"]
    whole = printed(capsys, *words, "--steps=0:6")
    assert [row["step"] for row in whole] == list(range(6))
    for first in (0, 2, 4):  # two steps of eight are an epoch of sixteen
        seen = [name for row in whole[first : first + 2] for name in row["ids"]]
        assert sorted(seen) == sorted(f"0:{n}" for n in range(16))
    parts = printed(capsys, *words, "--steps=3:6", "--processes=4", "--workers=0")
    order = [(row["step"], row["process"]) for row in parts]
    assert order == [(step, process) for step in (3, 4, 5) for process in range(4)]
    for step in (3, 4, 5):
        rows = [name for row in parts if row["step"] == step for name in row["ids"]]
        assert rows == whole[step]["ids"]
    assert printed(capsys, *words, "--steps=3:4", "--read")[0] == whole[3]


def test_other_verbs_print_one_json_object(shards, tmp_path, capsys):
    (verdict,) = printed(capsys, "validate", shards, "--json")
    assert verdict == {"records": 16, "ok": 16, "errors": {}}
    (figures,) = printed(capsys, "index", shards, "--json")
    assert (figures["files"], figures["records"]) == (1, 16)
    (figures,) = printed(capsys, "stats", shards, "--json")
    assert figures["formats"] == {"jpeg": 16}
    (figures,) = printed(capsys, "convert", shards, f"{tmp_path}/out", "--json")
    assert figures == {"files": 1, "records": 16, "skipped": {}}
    page = tmp_path / "samples.html"
    (figures,) = printed(
        capsys, "show", "--config=stage2_generative:tiny", SOURCES % f"webdataset:{shards}",
        f"--out={page}", "--samples=3", "--json",
    )
    assert figures["samples"] == 3 and page.read_text().count("<img ") == 3


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["valdate", "x"], 2, "nearest: validate"),
        ([], 2, "name what to do: validate"),
        (["validate", "/nowhere.jsonl"], 1, "no data file at /nowhere.jsonl"),
        (["ids", "--config=stage1_contrastive:tiny", "--steps=5:2"], 1, "--steps takes FIRST:END"),
        (["ids", "--config=stage1_contrastive:tiny", "--processes=3"], 1, "not divide among 3"),
        (["ids", "--config=stage1_contrastive:tiny", "--proceses=3"], 2, "nearest: --processes"),
    ],
)
def test_mistakes_are_one_line(capsys, words, code, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *words])
    error = capsys.readouterr().err
    assert caught.value.code == code and message in error and error.count("\n") == 1
