"""Rules against hand-written numpy, in both directions, and the list of what does not fit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from internvl_jax.convert import mapping
from internvl_jax.convert.mapping import (
    LeadingOnes,
    MappingError,
    PatchKernel,
    Rule,
    Same,
    Transpose,
    check,
)
from internvl_jax.convert.safetensors_files import Spec

RULES = (
    Rule("norm.weight", "norm/scale"),
    Rule("blocks.{i}.fc.weight", "blocks/fc/kernel", Transpose(), (0, 1, 2)),
    Rule("blocks.{i}.extra", "extra", Same(), (0, 2)),
)
OURS = {"norm/scale": (5,), "blocks/fc/kernel": (3, 2, 4), "extra": (2, 7)}


def torch_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"norm.weight": (5,), "blocks.0.extra": (7,), "blocks.2.extra": (7,)}
    shapes |= {f"blocks.{i}.fc.weight": (4, 2) for i in range(3)}
    return {key: rng.normal(size=shape).astype(dtype) for key, shape in shapes.items()}


def specs(tensors):
    return {key: Spec(array.shape, array.dtype) for key, array in tensors.items()}


def shapes(tensors):
    return {key: array.shape for key, array in tensors.items()}


@pytest.mark.parametrize(
    ("op", "torch_shape", "ours"),
    [
        (Same(), (3, 4), (3, 4)),
        (Transpose(), (3, 4), (4, 3)),
        (LeadingOnes(2), (1, 1, 6), (6,)),
        (LeadingOnes(1), (1, 5, 6), (5, 6)),
        (PatchKernel(), (7, 3, 4, 4), (48, 7)),
    ],
)
def test_operation_goes_there_and_back(op, torch_shape, ours):
    array = np.arange(np.prod(torch_shape), dtype=np.float32).reshape(torch_shape)
    result = op.to_jax(array)
    assert result.shape == ours
    assert op.torch_shape(ours) == torch_shape
    np.testing.assert_array_equal(op.to_torch(result), array)


def test_patch_kernel_multiplies_as_the_convolution_does():
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(6, 3, 2, 2))
    patch = rng.normal(size=(2, 2, 3))  # row, column, channel
    convolved = np.einsum("dcij,ijc->d", kernel, patch)
    np.testing.assert_allclose(patch.reshape(-1) @ PatchKernel().to_jax(kernel), convolved)


def test_layers_are_stacked_in_order_and_come_back():
    tensors = torch_tensors()
    ours = {
        path: leaf.read() for path, leaf in mapping.leaves(RULES, tensors, specs(tensors), OURS)
    }
    assert shapes(ours) == OURS
    for i in range(3):
        np.testing.assert_array_equal(
            ours["blocks/fc/kernel"][i], tensors[f"blocks.{i}.fc.weight"].T
        )
    np.testing.assert_array_equal(ours["extra"][1], tensors["blocks.2.extra"])
    back = mapping.TorchTensors(RULES, {path: jnp.asarray(a) for path, a in ours.items()})
    assert back.specs == specs(tensors)
    for key, array in tensors.items():
        np.testing.assert_array_equal(back.read(key), array)


def test_part_of_a_leaf_equals_the_part_of_the_whole_and_reads_only_its_layers():
    read = []

    class Recording(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    tensors = Recording(torch_tensors())
    leaf = dict(mapping.leaves(RULES, tensors, specs(torch_tensors()), OURS))["blocks/fc/kernel"]
    whole = leaf.read()
    read.clear()
    part = leaf.read((slice(1, 2), slice(0, 1), slice(2, 4)))
    np.testing.assert_array_equal(part, whole[1:2, 0:1, 2:4])
    assert read == ["blocks.1.fc.weight"]


def test_dtypes_are_kept_or_cast_and_mixed_layers_lose_nothing():
    tensors = torch_tensors()
    narrow = tensors["blocks.1.fc.weight"].astype(ml_dtypes.bfloat16)
    tensors["blocks.1.fc.weight"] = narrow
    leaves = dict(mapping.leaves(RULES, tensors, specs(tensors), OURS))
    kernel = leaves["blocks/fc/kernel"].read()
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], narrow.astype(np.float32).T)
    cast = dict(mapping.leaves(RULES, tensors, specs(tensors), OURS, dtype="bfloat16"))
    assert cast["norm/scale"].read().dtype == ml_dtypes.bfloat16
    parameters = {path: leaf.read() for path, leaf in leaves.items()}
    exported = mapping.TorchTensors(RULES, parameters, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(
        exported.read("norm.weight"), tensors["norm.weight"].astype(ml_dtypes.bfloat16)
    )


def test_missing_unexpected_and_misshaped_keys_are_listed_together():
    tensors = torch_tensors()
    for i in (0, 1):
        del tensors[f"blocks.{i}.fc.weight"]
    tensors["stranger"] = np.zeros(1, np.float32)
    tensors["rotary.inv_freq"] = np.zeros(1, np.float32)
    tensors["norm.weight"] = np.zeros((5, 2), np.float32)
    with pytest.raises(MappingError) as error:
        check(RULES, shapes(tensors), OURS, ignore=(r".*inv_freq",))
    text = str(error.value)
    assert "missing (2):\n    blocks.{i}.fc.weight   i = 0, 1" in text
    assert "unexpected (1):\n    stranger" in text and "inv_freq" not in text
    assert "norm.weight: has (5, 2), needs (5,)" in text


def test_table_that_does_not_cover_the_model_exactly_is_refused():
    tensors = torch_tensors()
    check(RULES, shapes(tensors), OURS)
    with pytest.raises(MappingError, match="lonely has no rule"):
        check(RULES, shapes(tensors), OURS | {"lonely": (1,)})
    with pytest.raises(MappingError, match=r"norm\.weight has 2 rules"):
        check((*RULES, Rule("norm.weight", "other")), shapes(tensors), OURS | {"other": (5,)})
    with pytest.raises(MappingError, match="the model has no extra"):
        check(RULES, shapes(tensors), {k: v for k, v in OURS.items() if k != "extra"})
    with pytest.raises(MappingError, match="does not stack 2 layers"):
        check(RULES, shapes(tensors), OURS | {"extra": (3, 7)})
