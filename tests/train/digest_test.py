"""Digests: every bit counts, the sharding does not."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.train.digest import RunningDigest, digests


def numpy_digest(array):
    """The formula of the module docstring with Python's unbounded integers."""
    width = array.dtype.itemsize
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{width}").tolist()

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    lanes = [(0x9E3779B1, 0x85EBCA77), (0xC2B2AE3D, 0x27D4EB2F)]
    sums = [
        sum(mix(x ^ ((c * i + d) % 2**32)) for i, x in enumerate(words)) % 2**32 for c, d in lanes
    ]
    return "".join(f"{x:08x}" for x in sums)


def some(dtype, shape=(3, 4, 5)):
    return np.random.default_rng(0).integers(-100, 100, shape).astype(dtype)


@pytest.mark.parametrize(
    "dtype", ["float32", ml_dtypes.bfloat16, "float16", "int32", "uint32", "int8", "bool"]
)
def test_digest_is_the_documented_sum(dtype):
    array = some(dtype)
    assert digests({"x": jnp.asarray(array)}) == {"x": numpy_digest(array)}


def test_scalars_empty_arrays_and_paths():
    tree = {"a": ({"b": jnp.float32(3)}, jnp.zeros((0, 2))), "c": jnp.int32(7)}
    assert digests(tree) == {
        "a/0/b": numpy_digest(np.float32(3)[None]),
        "a/1": "0" * 16,
        "c": numpy_digest(np.int32(7)[None]),
    }
    assert digests({}) == {}


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8"])
def test_every_single_flipped_bit_changes_the_digest(dtype):
    array = some(dtype, (2, 3))
    clean = digests({"x": jnp.asarray(array)})["x"]
    for position in range(array.nbytes * 8):
        raw = bytearray(array.tobytes())
        raw[position // 8] ^= 1 << position % 8
        flipped = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        found = digests({"x": jnp.asarray(flipped)})["x"]
        assert found[:8] != clean[:8] and found[8:] != clean[8:]


def test_order_and_sign_count():
    array = some("float32", (4, 4))
    exchanged = array.copy()
    exchanged[0, 0], exchanged[2, 1] = array[2, 1], array[0, 0]
    # Two opposite sign flips cancel in a plain weighted sum with odd weights.
    signs = array.copy()
    signs[0, 0], signs[1, 1] = -array[0, 0], -array[1, 1]
    trees = [array, exchanged, signs, array.T.copy(), array.reshape(2, 8)]
    found = [digests({"x": jnp.asarray(x)})["x"] for x in trees]
    assert len(set(found[:4])) == 4
    assert found[4] == found[0]  # the shape is checked elsewhere


def test_any_sharding_gives_the_same_digest():
    array = some("float32", (8, 16, 4))
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"))
    with jax.set_mesh(mesh):
        for spec in (P(), P("replica", "fsdp"), P(None, ("replica", "fsdp")), P("fsdp", None)):
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert digests({"x": placed})["x"] == numpy_digest(array), spec


def test_dtypes_without_words_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        digests({"x": jnp.zeros(3, jnp.complex64)})


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "int8"])
def test_pieces_in_any_order_give_the_digest_of_the_whole(dtype):
    array = np.random.default_rng(1).integers(-100, 100, (7, 20011)).astype(dtype)
    running = RunningDigest()
    for row in (3, 0, 5):
        running.add(array[row : row + 2], row * 20011)
    running.add(array[2], 2 * 20011)
    assert running.hexadecimal() == digests({"x": jnp.asarray(array)})["x"]
