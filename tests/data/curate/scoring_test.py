"""Score files: what they hold, and that the same call goes on where it was interrupted."""

import json
import os

import numpy as np
import pytest
from pyarrow import parquet

from internvl_jax.commands.data import score
from internvl_jax.data import image, sources
from internvl_jax.data.curate import hashing, scoring


@pytest.fixture
def shards(tmp_path, make):
    members = []
    for n in range(6):
        about = {"caption": f"picture {n}", "similarity": n / 10, "pwatermark": 0.5, "key": "x"}
        data = make.picture(n) if n != 4 else b"no image"
        members += [(f"{n}.jpg", data), (f"{n}.json", json.dumps(about).encode())]
    for shard in range(2):
        make.tar(tmp_path / f"{shard}.tar", members[shard * 6 : shard * 6 + 6])
    return f"{tmp_path}/{{0..1}}.tar"


def test_rows_of_a_shard(shards, tmp_path, make):
    counts = scoring.score(shards, tmp_path / "scores")
    assert counts == {"shards": 2, "written": 2, "records": 6, "errors": 1}
    tables = [parquet.read_table(tmp_path / "scores" / f"{n:06d}-{n}.tar.parquet") for n in (0, 1)]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert [row["error"] for row in rows] == [None] * 4 + ["corrupt_image", None]
    assert (rows[3]["width"], rows[3]["height"], rows[3]["caption"]) == (40, 30, "picture 3")
    assert rows[3]["similarity"] == np.float32(0.3) and rows[3]["watermark"] == 0.5
    expected = hashing.thumbnail(image.decode(make.picture(5)))
    assert rows[5]["thumbnail"] == expected.tobytes()


def test_what_is_missing_is_written_and_the_rest_kept(shards, tmp_path):
    folder = tmp_path / "scores"
    assert scoring.score(shards, folder, part=(1, 2))["written"] == 1
    (file,) = folder.glob("*.parquet")
    before = os.stat(file).st_mtime_ns
    assert file.name.startswith("000001-")
    assert scoring.score(shards, folder)["written"] == 1
    assert os.stat(file).st_mtime_ns == before
    assert scoring.score(shards, folder)["written"] == 0
    with pytest.raises(ValueError, match="holds scores of another source"):
        scoring.score(f"{tmp_path}/0.tar", folder)


def test_similarity_of_the_shipped_model_prefers_the_own_caption():
    encoder = score.Encoder("demo")
    source = sources.open_source("scenes/test_single", 48)
    images = [source.image(n) for n in range(0, 80, 10)]
    captions = [source.texts(n)["captions"]["en"][0] for n in range(0, 80, 10)]
    own, others = encoder(images, captions), encoder(images, captions[1:] + captions[:1])
    assert own.shape == (8,) and own.mean() > others.mean() + 0.1
