"""Every objective gives the same loss and gradients on eight devices as on one."""

import contextlib

import jax
import numpy as np
import pytest

from internvl_jax import models
from internvl_jax.models.chat import IMAGE_TOKEN
from internvl_jax.objectives import OBJECTIVES
from internvl_jax.rules import flatten
from internvl_jax.sharding import MeshError, batch_sharding, check_divisible, make_mesh

ROWS, LENGTH = 8, 12
FAMILY = {"language": "language", "instruct": "chat"}


def ids(rng: np.random.Generator, rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    """Right-padded rows of random length, ending in 2."""
    out = np.zeros((rows, length), np.int32)
    for row in out:
        count = rng.integers(6, length + 1)
        row[:count] = rng.integers(3, 600, count)
        row[0], row[count - 1] = 1, 2
    return out


def make_batch(objective: str, image_tokens: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (ROWS, 32, 32, 3), dtype=np.uint8)
    caption = ids(rng)
    labels = np.where(caption > 0, caption, -100)
    labels[:, :4] = -100
    if objective == "language":
        return {"tokens": caption}
    if objective == "instruct":
        tokens = np.concatenate(
            [np.full((ROWS, 1), 1), np.full((ROWS, image_tokens), IMAGE_TOKEN), caption], axis=1
        ).astype(np.int32)
        unseen = np.full((ROWS, 1 + image_tokens), -100)
        labels = np.concatenate([unseen, labels], axis=1).astype(np.int32)
        return {"image": image[:, None], "tokens": tokens, "labels": labels}
    return {
        "image": image,
        "text": ids(rng),
        "positive": ids(rng),
        "negative": ids(rng),
        "caption": caption,
        "caption_labels": labels.astype(np.int32),
        "image_id": np.array([0, 1, 2, 2, 3, 4, 4, 5], np.int32),
    }


def loss_and_gradients(objective: str, config, sizes: tuple[int, int, int] | None):
    mesh = None if sizes is None else make_mesh(*sizes)
    batch = make_batch(objective, getattr(config, "tokens_per_image", 16))
    options = {"mask_ratio": 0.5} if objective == "contrastive" else {}
    params = jax.device_get(models.create(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), ROWS)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if mesh is not None:
            keys = jax.device_put(keys, batch_sharding(mesh))
            check_divisible(config, mesh, ROWS)
            params = jax.device_put(params, models.shardings(config, mesh))
            batch = jax.device_put(batch, batch_sharding(mesh))

        def loss(params):
            model = models.bind(config, params)
            return OBJECTIVES[objective](**options)(model, batch, keys)[0]

        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
        return float(value), jax.device_get(flatten(gradients))


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        *((objective, {}) for objective in OBJECTIVES),
        ("instruct", {"projector": "pixel_shuffle"}),
        ("instruct", {"projector": "two_mlp", "middleware": "tiny"}),
    ],
)
def test_sharded_objective_equals_unsharded(objective, fields):
    model = {"family": FAMILY.get(objective, "internvl"), "size": "tiny", "drop_path": 0.1}
    model |= fields
    if model["family"] == "language":
        del model["drop_path"]
    config = models.from_dict(model)
    expected, expected_gradients = loss_and_gradients(objective, config, None)
    value, gradients = loss_and_gradients(objective, config, (2, 2, 2))
    assert np.isfinite(expected)
    assert value == pytest.approx(expected, abs=2e-5)
    for path, reference in expected_gradients.items():
        bound = 1e-4 * np.abs(reference).max() + 1e-5
        assert np.abs(gradients[path] - reference).max() <= bound, path


def test_mesh_that_does_not_divide_is_one_readable_error():
    config = models.from_dict({"family": "internvl", "size": "14b"})
    config.sharded_dimensions()
    mesh = make_mesh(1, 1, 8)
    check_divisible(config, mesh)
    tiny = models.from_dict({"family": "internvl", "size": "tiny"})
    with pytest.raises(MeshError, match="llama num_heads = 2 over tensor = 8"):
        check_divisible(tiny, mesh)
    with pytest.raises(MeshError, match="batch_size = 3"):
        check_divisible(tiny, make_mesh(2, 4, 1), batch_size=3)
    with pytest.raises(MeshError) as caught:
        check_divisible(tiny, make_mesh(1, 4, 2, jax.devices()), batch_size=8, chunks=4)
    assert "batch_size = 8 over ('replica', 'fsdp') = 4 and then 4 chunks" in str(caught.value)


def test_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(MeshError, match="does not fit 8 cpu"):
        make_mesh(3, 1, 1)
