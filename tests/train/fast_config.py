"""The smallest language model that is still the real one: seconds per run on a CPU."""

from internvl_jax.configs import language


def get_config(arg=""):
    config = language.get_config("tiny")
    config.model.depth = 1
    config.model.width = 16
    config.model.mlp_dim = 16
    config.data.text_length = 16
    # The digits would import scikit-learn, which takes longer than the run.
    with config.ignore_type():
        config.data.sources = (("scenes", 1.0),)
    # The length of a run does not change its course, so that runs of different lengths compare.
    config.optimizer.schedule = "constant"
    config.checkpoint.keep = 10
    return config
