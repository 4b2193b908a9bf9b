"""Search in memory-mapped galleries beside plain sorting."""

import numpy as np
import pytest

from internvl_jax.evals import scores
from internvl_jax.evals.gallery import Gallery, search


def _unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    rows = _unit(rng, 500, 16)
    paths = [tmp_path / f"image-{n:05d}.npy" for n in range(3)]
    for path, part in zip(paths, np.split(rows, [130, 137]), strict=True):
        np.save(path, part)
    return paths, rows, rng


@pytest.mark.parametrize(("block", "query_block"), [(64, 7), (1000, 1000), (5, 33)])
def test_hits_and_ranks_are_those_of_the_evaluators(files, block, query_block):
    paths, rows, rng = files
    right = rng.integers(0, 500, 40)
    queries = rows[right] + 0.4 * _unit(rng, 40, 16)
    gallery = Gallery(paths)
    assert len(gallery) == 500 and gallery.width == 16
    hits, best, rank = search(queries, gallery, right, rows=block, query_block=query_block)
    wanted_rank, wanted = scores.ranks(queries, rows, right, np.arange(500))
    assert np.array_equal(rank, wanted_rank) and np.array_equal(hits, wanted)
    values = np.take_along_axis(queries @ rows.T, hits, axis=1)
    np.testing.assert_allclose(best, values, atol=1e-6)


def test_equal_rows_count_before_the_right_one(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((50, 4), np.float32))
    hits, _, rank = search(np.ones((2, 4)), Gallery([tmp_path / "a.npy"]), np.array([0, 49]))
    assert rank.tolist() == [49, 49]
    assert hits[0].tolist() == list(range(10))


def test_features_that_are_not_numbers_find_nothing(tmp_path):
    np.save(tmp_path / "a.npy", np.full((30, 4), np.nan, np.float32))
    _, _, rank = search(np.ones((1, 4)), Gallery([tmp_path / "a.npy"]), np.array([3]))
    assert rank.tolist() == [29]


def test_what_is_no_gallery_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        Gallery([])
    for n in (3, 4):
        np.save(tmp_path / f"{n}.npy", np.zeros((2, n), np.float32))
    with pytest.raises(ValueError, match=r"one width; .*\[2, 3\].*\[2, 4\]"):
        Gallery([tmp_path / "3.npy", tmp_path / "4.npy"])
    with pytest.raises(ValueError, match="a row below 2 for 1 queries"):
        search(np.zeros((1, 3)), Gallery([tmp_path / "3.npy"]), np.array([2]))
