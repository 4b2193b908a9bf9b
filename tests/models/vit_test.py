"""The vision tower: patches, token masking, stochastic depth, layer selection, scan and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import models
from internvl_jax.models.config import VITS, replace
from internvl_jax.models.layers import drop_path
from internvl_jax.models.positions import bicubic_matrix, resize_position_embedding
from internvl_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, ViT, normalise, patchify

CONFIG = VITS["tiny"]


@pytest.fixture(scope="module")
def vit():
    return ViT(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)


def test_patches_are_row_major_and_channel_last(pixels):
    patches = np.asarray(patchify(jnp.asarray(pixels), 8))
    np.testing.assert_array_equal(patches[1, 5], pixels[1, 8:16, 8:16].reshape(-1))


def test_uint8_is_normalised_and_floats_are_left_alone(pixels):
    expected = (pixels / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(normalise(jnp.asarray(pixels)), expected, atol=1e-6)
    floats = jnp.asarray(expected, jnp.float32)
    assert normalise(floats) is floats


def test_image_that_is_no_whole_number_of_patches(vit):
    with pytest.raises(ValueError, match="30×32 pixels is not a multiple of patch 8"):
        vit(jnp.zeros((1, 30, 32, 3)))


def test_token_masking_keeps_the_class_token_and_a_subset_of_patches(vit, pixels):
    whole = np.asarray(vit.embed(pixels))
    keys = jax.random.split(jax.random.key(1), 3)
    masked = np.asarray(vit.embed(pixels, mask_ratio=0.5, keys=keys))
    assert masked.shape == (3, 1 + 8, CONFIG.width)
    np.testing.assert_allclose(masked[:, 0], whole[:, 0], atol=1e-6)
    kept = []
    for image in range(3):
        distance = np.abs(masked[image, 1:, None] - whole[image, None, 1:]).max(-1)
        assert (distance.min(axis=1) < 1e-5).all()
        kept.append(tuple(sorted(distance.argmin(axis=1))))
        assert len(set(kept[-1])) == 8
    assert len(set(kept)) > 1  # another set for each image


def test_published_token_counts():
    """99 tokens at 196 px with half removed, 257 at 224 px."""
    config = replace(CONFIG, patch_size=14, image_size=224)
    vit = ViT(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 1)
    masked = vit.embed(jnp.zeros((1, 196, 196, 3)), mask_ratio=0.5, keys=keys)
    assert masked.shape[1] == 99
    assert vit.embed(jnp.zeros((1, 224, 224, 3))).shape[1] == 257


def test_layers_count_like_the_list_of_hidden_states(vit, pixels):
    last, states = vit(pixels, hidden_states=True)
    assert states.shape[0] == CONFIG.depth + 1
    np.testing.assert_allclose(vit(pixels, layers=-1), last, atol=1e-6)
    np.testing.assert_allclose(vit(pixels, layers=-2), states[-2], atol=1e-5)
    np.testing.assert_allclose(vit(pixels, layers=0), states[0], atol=1e-6)
    with pytest.raises(ValueError, match="outside the tower"):
        vit(pixels, layers=7)


@pytest.mark.parametrize(
    ("remat", "unroll"), [("full", 1), ("attention", 1), ("projections", 2), ("none", 2)]
)
def test_remat_and_unroll_change_no_value(vit, pixels, remat, unroll):
    other = ViT(replace(CONFIG, remat=remat, unroll=unroll), jax.random.key(0))

    def loss(vit):
        return jnp.sum(jnp.sin(vit(pixels)))

    expected, expected_gradient = jax.value_and_grad(loss)(vit)
    value, gradient = jax.value_and_grad(loss)(other)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_drop_path_keeps_the_mean_and_drops_whole_examples():
    x = jnp.ones((4000, 3))
    out = np.asarray(drop_path(x, 0.25, jax.random.split(jax.random.key(0), 4000)))
    assert {round(float(v), 5) for v in np.unique(out)} == {0.0, round(4 / 3, 5)}
    assert (out.min(axis=1) == out.max(axis=1)).all()
    assert out.mean() == pytest.approx(1.0, abs=0.03)
    assert drop_path(x, 0.25, None) is x


def test_drop_path_schedules():
    assert replace(CONFIG, depth=5, drop_path=0.2).drop_path_rates() == pytest.approx(
        [0.0, 0.05, 0.1, 0.15, 0.2]
    )
    uniform = replace(CONFIG, depth=3, drop_path=0.2, drop_path_schedule="uniform")
    assert uniform.drop_path_rates() == [0.2] * 3


def test_bicubic_weights_sum_to_one_and_identity_is_exact():
    for old, new in [(4, 7), (16, 26), (7, 3)]:
        np.testing.assert_allclose(bicubic_matrix(old, new).sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(bicubic_matrix(5, 5), np.eye(5, dtype=np.float32))
    with pytest.raises(ValueError, match="square grid"):
        resize_position_embedding(jnp.zeros((6, 2)), (3, 3))


def test_bfloat16_tower_follows_the_float32_one(pixels):
    config = models.from_dict(dict(family="internvl", size="tiny"))
    half = models.from_dict(dict(family="internvl", size="tiny", dtype="bfloat16"))
    params = models.create(config, jax.random.key(0))
    exact = models.bind(config, params).encode_image(pixels, "g")
    rough = models.bind(half, params).encode_image(pixels, "g")
    assert np.abs(np.asarray(exact) - np.asarray(rough, np.float32)).max() < 0.05
