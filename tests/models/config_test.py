"""Named sizes, overrides and their errors; published parameter counts."""

import math

import jax
import pytest

from internvl_jax import models
from internvl_jax.models.config import INTERNVLS, ModelConfigError
from internvl_jax.rules import flatten
from internvl_jax.sharding import MeshError, check_divisible, make_mesh


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_published_parameter_counts():
    """Spec §4: 5,902,793,600 in the tower and 13,834,975,747 in all; stage 2 trains 1.01 B."""
    tree = models.abstract(INTERNVLS["14b"])
    assert count(tree["vit"]) == 5_902_793_600
    assert count(tree) == 13_834_975_747
    assert count(tree["cross"]) == 956_418_048
    assert count(tree["pool2"]) == 53_515_008
    assert count(tree["match_head"]) == 8_194


def test_internvl_c_has_no_middleware_and_no_language_head():
    tree = models.abstract(models.from_dict(dict(family="internvl", size="14b", num_queries=0)))
    assert set(tree) == {"vit", "llama", "pool", "text_projection", "logit_scale"}
    assert "lm_head" not in tree["llama"]
    # The raw C checkpoint: 12,620,029,697 parameters.
    assert count(tree) == 12_620_029_697


def test_overrides_reach_every_part_that_has_the_field():
    config = models.from_dict(
        dict(family="internvl", size="tiny", dtype="bfloat16", image_size=64, num_queries=3)
    )
    assert (config.vit.dtype, config.llama.dtype) == ("bfloat16", "bfloat16")
    assert (config.vit.grid, config.num_queries) == (8, 3)
    fields = dict(family="chat", size="tiny", projector="two_mlp", middleware="tiny")
    chat = models.from_dict(fields)
    assert chat.tokens_per_image == 16 + 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(family="internvl", size="tyni"), "did you mean 'tiny'"),
        (dict(family="internvll", size="tiny"), "did you mean 'internvl'"),
        (dict(family="internvl", size="tiny", image_sise=32), "did you mean 'image_size'"),
        (dict(family="internvl", size="tiny", image_size=33), "divide by patch_size"),
        (dict(family="chat", size="tiny", projector="two_mlp"), "come together"),
        (dict(family="chat", size="tiny", projector="conv"), "choose from mlp"),
    ],
)
def test_errors_name_what_is_wrong(fields, message):
    with pytest.raises(ModelConfigError, match=message):
        models.from_dict(fields)


def test_the_14b_model_on_a_pod_mesh():
    """256 chips: fsdp 128 divides everything, fsdp 256 does not (width 3200 = 128 · 25)."""

    class Pod:
        def __init__(self, **shape):
            self.shape = shape

    check_divisible(INTERNVLS["14b"], Pod(replica=2, fsdp=128, tensor=1), 163_840)
    with pytest.raises(MeshError, match="vit width = 3200 over fsdp = 256"):
        check_divisible(INTERNVLS["14b"], Pod(replica=1, fsdp=256, tensor=1))


def test_large_weights_are_cut_over_the_mesh():
    config = models.from_dict(dict(family="internvl", size="tiny"))
    mesh = make_mesh(2, 2, 2)
    check_divisible(config, mesh)
    tree = flatten(models.abstract(config))
    for path, sharding in flatten(models.shardings(config, mesh)).items():
        if path.endswith("/kernel") and "match_head" not in path:
            pieces = math.prod(tree[path].shape) / math.prod(sharding.shard_shape(tree[path].shape))
            assert pieces >= 2, path
