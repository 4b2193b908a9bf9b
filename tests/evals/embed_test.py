"""`internvl-jax embed`: features in shards, resumed, refused, and used as a gallery."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from internvl_jax import cli
from internvl_jax.data import sources
from internvl_jax.evals import embed
from internvl_jax.evals.gallery import Gallery, search


def _embed(demo, output, **options):
    source = sources.EmbeddedScenes("test", 50)
    return embed.embed(
        demo.config, demo.params, source, output, tokenizer=demo.tokenizer,
        text_length=32, shard_size=20, batch_size=16, **options,
    )  # fmt: skip


def test_shards_hold_the_models_features_and_find_their_captions(tmp_path, demo):
    assert _embed(demo, tmp_path) == 3
    source = sources.EmbeddedScenes("test", 50)
    images = [tmp_path / f"image-{n:05d}.npy" for n in range(3)]
    found = np.concatenate([np.load(path) for path in images])
    wanted = demo.encode_image(source.images)
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    index = json.loads((tmp_path / "index-00002.json").read_text())
    assert len(index["caption"]) == 10
    assert index["caption"][0] == source.texts(40)["captions"]["en"][0]
    texts = np.concatenate([np.load(tmp_path / f"text-{n:05d}.npy") for n in range(3)])
    _, _, rank = search(texts, Gallery(images), np.arange(50))
    assert np.mean(rank < 5) >= 0.9  # of fifty scenes


def test_an_interrupted_run_goes_on_and_another_is_refused(tmp_path, demo):
    _embed(demo, tmp_path)
    before = (tmp_path / "image-00001.npy").read_bytes()
    kept = (tmp_path / "image-00000.npy").stat().st_mtime_ns
    # As if it had been stopped while it wrote the second shard: its index comes last.
    (tmp_path / "index-00001.json").unlink()
    (tmp_path / "image-00001.npy").write_bytes(b"")
    assert _embed(demo, tmp_path) == 1
    assert (tmp_path / "image-00001.npy").read_bytes() == before
    assert (tmp_path / "image-00000.npy").stat().st_mtime_ns == kept
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(embed.EmbedError, match="features of mode 'c', not 'g'"):
        _embed(demo, tmp_path, mode="g")
    with pytest.raises(embed.EmbedError, match="unknown format 'csv'; there are npy, parquet"):
        _embed(demo, tmp_path, file_format="csv")


def test_the_command_writes_parquet(tmp_path, capsys):
    words = ["embed", "--checkpoint=demo", "--source=digits/test", "--mode=g", "--dtype=float16"]
    cli.main([*words, f"--output={tmp_path}", "--format=parquet", "--shard_size=200"])
    assert "360 rows" in capsys.readouterr().out
    tables = [parquet.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))]
    assert [len(table) for table in tables] == [200, 160]
    image = np.stack(tables[0]["image"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=2e-3)
    assert {"image", "text", "image_id", "caption"} == set(tables[0].column_names)
