"""Starting from other checkpoints: which parameter comes from where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax import rules
from internvl_jax.models.positions import resize_position_embedding
from internvl_jax.train import checkpoint, pretrained


@pytest.fixture(scope="module")
def mesh():
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


def random(seed, **sizes):
    """Parameters from {"a__b": shape} (two underscores stand for a slash)."""
    rng = np.random.default_rng(seed)
    return rules.unflatten(
        {
            name.replace("__", "/"): jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in sizes.items()
        }
    )


def shapes(mesh, dtype=jnp.float32, **sizes):
    return rules.unflatten(
        {
            name.replace("__", "/"): jax.ShapeDtypeStruct(
                shape, dtype, sharding=NamedSharding(mesh, P(None, "fsdp"))
            )
            for name, shape in sizes.items()
        }
    )


def test_first_checkpoint_that_fits_gives_each_parameter(mesh, tmp_path):
    first = random(0, llama__q=(8, 8), llama__embed=(5, 8), pool__kernel=(8, 4))
    second = random(1, llama__q=(8, 8), llama__embed=(7, 8), llama__head=(8, 8))
    pretrained.save_params(tmp_path / "first", first)
    pretrained.save_params(tmp_path / "second", second)
    wanted = shapes(
        mesh,
        llama__q=(8, 8),
        llama__embed=(7, 8),
        llama__head=(8, 8),
        queries=(2, 8),
        pool__kernel=(9, 4),
    )
    sources = [dict(path=tmp_path / "first"), dict(path=str(tmp_path / "second"))]
    loaded = pretrained.load_params(sources, wanted)
    found = rules.flatten(loaded.params)
    np.testing.assert_array_equal(found["llama/q"], first["llama"]["q"])
    np.testing.assert_array_equal(found["llama/embed"], second["llama"]["embed"])
    np.testing.assert_array_equal(found["llama/head"], second["llama"]["head"])
    assert found["llama/q"].sharding.spec == P(None, "fsdp")
    assert loaded.sources["llama/q"].endswith("first")
    assert loaded.sources["llama/embed"].endswith("second")
    assert loaded.fresh == ["queries", "pool/kernel"]
    assert loaded.misfits == {"pool/kernel": ((8, 4), (9, 4))}
    report = str(loaded).splitlines()
    assert report[0] == f"from {tmp_path}/first: 1 arrays (llama)"
    assert report[1] == f"from {tmp_path}/second: 2 arrays (llama/… 2)"
    assert report[2] == "not taken: pool/kernel is stored as (8, 4), the model has (9, 4)"
    assert report[3] == "initialised: 2 arrays (pool, queries)"


def test_rename_and_cast(mesh, tmp_path):
    source = random(0, llama__blocks__q=(2, 8, 8), llama__norm=(1, 8))
    pretrained.save_params(tmp_path / "a", source)
    wanted = shapes(mesh, jnp.bfloat16, llm__blocks__q=(2, 8, 8), llama__norm=(1, 8))
    entry = dict(path=tmp_path / "a", rename=((r"llama/(blocks/.*)", r"llm/\1"),))
    loaded = pretrained.load_params([entry], wanted)
    q = loaded.params["llm"]["blocks"]["q"]
    assert q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(q, source["llama"]["blocks"]["q"].astype(jnp.bfloat16))
    assert loaded.fresh == []


def test_position_embedding_of_another_grid_is_resized(mesh, tmp_path):
    source = random(0, vit__position_embedding=(1 + 16, 8), vit__class_embedding=(1, 8))
    pretrained.save_params(tmp_path / "a", source)
    wanted = shapes(mesh, vit__position_embedding=(1 + 36, 8), vit__class_embedding=(1, 8))
    loaded = pretrained.load_params([dict(path=tmp_path / "a")], wanted)
    found = loaded.params["vit"]["position_embedding"]
    expected = resize_position_embedding(source["vit"]["position_embedding"], (6, 6))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert found.sharding.spec == P(None, "fsdp")
    assert loaded.sources["vit/position_embedding"].endswith("(resized 4×4 → 6×6)")


def test_sources_that_give_nothing_are_named(mesh, tmp_path):
    wanted = shapes(mesh, llama__q=(8, 8))
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist"):
        pretrained.load_params([dict(path=tmp_path / "nowhere")], wanted)
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        pretrained.load_params([dict(path=tmp_path)], wanted)
    pretrained.save_params(tmp_path / "other", random(0, vit__kernel=(4, 4)))
    with pytest.raises(checkpoint.CheckpointError, match="fits this model; it holds vit"):
        pretrained.load_params([dict(path=tmp_path / "other")], wanted)


def test_saved_parameters_are_read_by_path_alone_and_verified(mesh, tmp_path):
    params = random(0, llama__q=(64, 64), logit_scale=())
    step = pretrained.save_params(tmp_path / "a" / "checkpoints" / "12", params, config={"x": 1})
    for path in (tmp_path / "a", tmp_path / "a" / "checkpoints", step):
        assert pretrained.find_step(path) == step
    read, meta = pretrained.read_params(tmp_path / "a")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert meta["config"] == {"x": 1}
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        pretrained.save_params(step, params)
    file = max((step / "params").rglob("*"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointCorrupt, match="llama/q"):
        pretrained.read_params(tmp_path / "a")
