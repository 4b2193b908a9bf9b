"""The train loop in this process: where parameters come from, and what it refuses."""

import jax
import numpy as np
import pytest

from internvl_jax import rules, sharding
from internvl_jax.train import loop, pretrained
from tests.train import fast_config


def config(**changes):
    config = fast_config.get_config()
    config.checkpoint.every = 2
    config.steps = 2
    with config.ignore_type():
        config.update(changes)
    return config


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(work directory, returned metrics) of a run over two steps on eight devices."""
    path = tmp_path_factory.mktemp("first") / "run"
    return path, loop.train(config(), path)


def test_returns_the_last_metrics_and_writes_them(first):
    path, last = first
    assert last["loss"] < 8 and last["skipped"] == 0
    assert {"grad_norm", "learning_rate", "step_seconds", "images_per_second"} <= set(last)
    assert (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()
    params, meta = pretrained.read_params(path)
    assert meta["step"] == 2 and meta["config"]["objective"] == "language"
    assert rules.flatten(params)["llama/embed/embedding"].shape == (960, 16)


def test_init_from_gives_the_weights_and_frozen_ones_stay(first, tmp_path, capsys):
    before = rules.flatten(pretrained.read_params(first[0])[0])
    source = dict(path=str(first[0]), rename=((r"llama/norm/(.*)", r"elsewhere/\1"),))
    loop.train(
        config(init_from=(source,), trainable="llama/blocks/mlp/.*|llama/norm/.*", seed=3),
        tmp_path / "second",
    )
    printed = capsys.readouterr().err
    assert f"from {first[0]}/checkpoints/2: 11 arrays (llama/… 11)" in printed
    assert "initialised: 1 arrays (llama)" in printed
    after = rules.flatten(pretrained.read_params(tmp_path / "second")[0])
    for path, value in after.items():
        same = np.array_equal(value, before[path])
        assert same == (("mlp" not in path) and ("llama/norm" not in path)), path
    # The renamed one was not found, so it is new: ones, moved by two steps at 0.002.
    np.testing.assert_allclose(after["llama/norm/scale"], 1.0, atol=0.005)


def test_a_finished_run_trains_no_further(first, capsys):
    path, _ = first
    files = {p: p.stat().st_mtime_ns for p in (path / "checkpoints").rglob("*") if p.is_file()}
    assert loop.train(config(), path) == {}
    assert "has its 2 steps already" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in (path / "checkpoints").rglob("*") if p.is_file()}
    assert files == after


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    wrong = config()
    wrong.mesh.update(fsdp=3)
    with pytest.raises(sharding.MeshError, match="does not fit 8 cpu device"):
        loop.train(wrong, tmp_path / "run")
    with pytest.raises(sharding.MeshError, match="batch_size = 6"):
        loop.train(config(batch_size=6), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    small = config()
    small.model.vocab_size = 900
    with pytest.raises(ValueError, match=r"960 pieces, but llama/embed/embedding has 900 rows"):
        loop.train(small, tmp_path / "run")
    with pytest.raises(rules.RuleError, match="matches no parameter"):
        loop.train(config(trainable="vit/.*"), tmp_path / "run")


def test_batches_lie_over_replica_and_fsdp():
    mesh = sharding.make_mesh(replica=2, fsdp=4)
    batch = {"tokens": np.arange(16).reshape(8, 2)}
    placed = loop.to_devices(batch, mesh)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.sharding == sharding.batch_sharding(mesh)
    assert {s.data.shape for s in placed.addressable_shards} == {(1, 2)}
    assert jax.device_count() == 8
