"""Checkpoints: exact, on any mesh, and honest about damage."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.train import checkpoint
from internvl_jax.train import state as states

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
make_state = functools.partial(states.create, trainable="tower/.*|scale", tx=TX)


def mesh_of(replica, fsdp):
    devices = jax.devices()[: replica * fsdp]
    return jax.make_mesh((replica, fsdp), ("replica", "fsdp"), devices=devices)


FSDP = P("fsdp")


def shapes(mesh, spec=FSDP):
    """Parameters on a mesh, sharded by `spec` where they have an axis."""
    tree = {
        "tower": {"kernel": ((64, 96), jnp.float32), "half": ((8, 4), jnp.bfloat16)},
        "scale": ((), jnp.float32),
        "head": {"kernel": ((16, 8), jnp.float32), "count": ((8,), jnp.int32)},
    }
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            *leaf, sharding=NamedSharding(mesh, spec if leaf[0] else P())
        ),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def random_params(mesh):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), s.sharding),
        shapes(mesh),
    )


def abstract(mesh, spec=FSDP):
    return states.on_mesh(jax.eval_shape(make_state, shapes(mesh, spec)), mesh)


@jax.jit
def advance(state):
    def grow(tree):
        def add(x):
            if not x.ndim:
                return x + 1
            noise = jnp.sin(1e3 * jnp.arange(x.size, dtype=jnp.float32) + state.step)
            return x + noise.reshape(x.shape).astype(x.dtype)

        return jax.tree.map(add, tree)

    return states.TrainState(
        state.step + 1,
        grow(state.trainable),
        state.frozen,
        grow(state.opt_state),
        state.skipped,
        state.nonfinite_in_a_row,
    )


@pytest.fixture
def saved(tmp_path):
    """(checkpoints, {step: state on the host}) of steps 1 to 3, on a mesh of eight."""
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", keep=5)
        state = jax.jit(make_state)(random_params(mesh))
        kept = {}
        for _ in range(3):
            state = advance(state)
            step = checkpoints.save(state, config={"seed": 1}, data_fingerprint="abc")
            kept[step] = jax.device_get(state)
        checkpoints.wait()
    yield checkpoints, kept
    checkpoints.close()


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)


def test_newest_step_comes_back_bit_for_bit_with_its_meta(saved):
    checkpoints, kept = saved
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        state, meta = checkpoints.restore(abstract(mesh))
    assert_same(state, kept[3])
    assert jax.tree.structure(state) == jax.tree.structure(kept[3])
    assert (meta["step"], meta["config"], meta["data_fingerprint"]) == (3, {"seed": 1}, "abc")
    assert meta["leaves"]["params/tower/half"]["dtype"] == "bfloat16"
    assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize(
    ("replica", "fsdp", "spec"),
    [(1, 4, FSDP), (2, 2, P(None)), (1, 1, P()), (4, 2, P("replica"))],
)
def test_restores_onto_another_mesh_and_sharding(saved, replica, fsdp, spec):
    checkpoints, kept = saved
    mesh = mesh_of(replica, fsdp)
    with jax.set_mesh(mesh):
        wanted = abstract(mesh, spec)
        state, _ = checkpoints.restore(wanted)
    assert_same(state, kept[3])
    for found, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert found.sharding.is_equivalent_to(leaf.sharding, found.ndim)


def test_only_the_newest_are_kept_and_donation_spoils_nothing(tmp_path):
    mesh = mesh_of(1, 2)
    donating = jax.jit(lambda s: advance(s), donate_argnums=0)
    with jax.set_mesh(mesh):
        checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
        state = jax.jit(make_state)(random_params(mesh))
        for _ in range(6):
            checkpoints.save(state)
            # The buffers just handed to the writer are overwritten while it writes.
            state = donating(state)
        checkpoints.wait()
        assert checkpoints.steps() == [4, 5]
        restored, _ = checkpoints.restore(abstract(mesh), strict=True)
        assert int(restored.step) == 5
        checkpoints.close()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def data_file(checkpoints, step, item):
    files = (checkpoints.directory / str(step) / item).rglob("*")
    return max((p for p in files if p.is_file()), key=lambda p: p.stat().st_size)


def test_flipped_bit_is_found_named_and_the_step_before_is_used(saved, capsys):
    checkpoints, kept = saved
    flip(data_file(checkpoints, 3, "opt_state"))
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        with pytest.raises(checkpoint.CheckpointCorrupt, match=r"opt_state/1/(mu|nu)/tower"):
            checkpoints.restore(abstract(mesh), strict=True)
        state, _ = checkpoints.restore(abstract(mesh))
    assert_same(state, kept[2])
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: step 3 is damaged.*opt_state/1/(mu|nu)/tower.*digest", warning)
    # The number is free again, and the damaged step is kept aside.
    assert checkpoints.steps() == [1, 2]
    assert (checkpoints.directory.parent / "damaged" / "3" / "opt_state").is_dir()
    with jax.set_mesh(mesh):
        checkpoints.save(advance(state))
        checkpoints.wait()
        state, _ = checkpoints.restore(abstract(mesh), strict=True)
    assert_same(state, kept[3])


def test_no_intact_step_is_an_error_and_nothing_is_moved(saved):
    checkpoints, _ = saved
    for step in (1, 2, 3):
        (checkpoints.directory / str(step) / "meta" / "metadata").write_text("")
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh), pytest.raises(checkpoint.CheckpointCorrupt, match="no intact"):
        checkpoints.restore(abstract(mesh))
    assert checkpoints.steps() == [1, 2, 3]


def test_meta_vouches_for_itself(saved):
    checkpoints, _ = saved
    file = checkpoints.directory / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    meta["data_fingerprint"] = "abd"
    file.write_text(json.dumps(meta))
    with pytest.raises(checkpoint.CheckpointCorrupt, match="own checksum"):
        checkpoint.read_meta(file.parent.parent)


def test_another_model_is_refused_not_taken_for_damage(saved):
    checkpoints, _ = saved
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        wanted = abstract(mesh)
        wanted.frozen["head"]["kernel"] = jax.ShapeDtypeStruct(
            (16, 9), jnp.float32, sharding=NamedSharding(mesh, P())
        )
        with pytest.raises(checkpoint.CheckpointError, match=r"head/kernel: stored as \(16, 8\)"):
            checkpoints.restore(wanted)
    assert checkpoints.steps() == [1, 2, 3]


def test_unfinished_saves_are_removed_and_reported(tmp_path):
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "params").mkdir()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.removed == [left.name]
    assert not left.exists()
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        assert checkpoints.restore(abstract(mesh)) is None
    checkpoints.close()
