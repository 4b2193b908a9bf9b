import jax
import pytest

from internvl_jax import configuration, sharding
from internvl_jax.data import pipelines
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.models import config as models
from internvl_jax.plan import experiment


@pytest.mark.parametrize(
    "name",
    [
        "language:tiny",
        "stage1_contrastive:tiny",
        "stage2_generative:tiny",
        "stage3_sft:tiny",
        "finetune_retrieval:tiny",
    ],
)
def test_the_planned_batch_is_that_of_the_pipeline(name):
    config = configuration.load(name)
    fields = dict(config.data)
    fields.pop("tokenizer")
    pipeline = pipelines.build(
        **fields,
        batch_size=config.batch_size,
        seed=0,
        tokenizer=Tokenizer(None),
        num_image_tokens=getattr(models.from_dict(config.model), "tokens_per_image", 0),
    )
    planned = experiment.batch_shapes(config, sharding.make_mesh(fsdp=-1))
    real = {n: (x.shape, x.dtype) for n, x in pipeline.batch(0).items()}
    assert {n: (x.shape, x.dtype) for n, x in planned.items()} == real


def test_the_planned_arguments_are_counted_per_device():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {
        "sharded": jax.ShapeDtypeStruct((64, 4), "float32", sharding=sharding.batch_sharding(mesh)),
    }
    assert experiment.bytes_per_device(tree) == 64 * 4 * 4 / 8
