"""The planned step is the trained one; checked on this machine's devices instead of a pod's."""

import jax

from internvl_jax import configuration
from internvl_jax.plan import experiment


def test_an_experiment_is_built_without_data_or_parameters():
    config = configuration.load("stage2_generative:tiny")
    built = experiment.build(config, jax.devices())
    frozen = built.params_frozen
    assert frozen > built.params_trained > 0
    assert built.samples == config.steps * config.batch_size
    assert built.model_flops > 2 * config.batch_size * (built.params_trained + frozen)
    state, batch = built.arguments
    assert batch["image"].shape[0] == config.batch_size
    with jax.set_mesh(built.mesh):
        after = jax.eval_shape(built.step, state, batch)[0]
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (state, after))
    assert shapes[0] == shapes[1]
