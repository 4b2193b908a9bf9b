"""The embedded job: every stage of the paper in miniature, in minutes on two CPU cores.

    internvl-jax demo                                                          (all stages)
    internvl-jax train --config=demo:contrastive --workdir=runs/demo/contrastive

One stage per argument, in this order: language, contrastive, contrastive_full, generative,
projector, sft. The architecture is the real one at width 128 and 48 pixels. One thing differs from
the paper: stage 2 also trains the language model and its head, since the embedded one is too small
to have learnt to write before.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from internvl_jax import configuration
from internvl_jax.configs import common

LAYERS = 4


def language(config: ConfigDict) -> None:
    """Stage 0: the paper starts from a pre-trained multilingual LLaMA; this makes a small one."""
    config.objective = config.data.task = "language"
    config.model.family = "language"
    config.batch_size = 64
    config.steps = 300
    config.optimizer.learning_rate = ((r".*", 2e-3),)


def contrastive(config: ConfigDict) -> None:
    """Stage 1 with half of the image tokens removed."""
    config.objective = config.data.task = "contrastive"
    config.objective_options = ConfigDict(dict(mask_ratio=0.5))
    config.model.num_queries = 0
    config.init_from = (dict(path="runs/demo/language"),)
    config.batch_size = 128
    config.steps = 500
    config.optimizer.learning_rate = ((r"vit/.*|pool/.*", 2e-3), (r".*", 1e-3))


def contrastive_full(config: ConfigDict) -> None:
    """The end of stage 1, with all image tokens."""
    contrastive(config)
    config.objective_options.mask_ratio = 0.0
    config.init_from = (dict(path="runs/demo/contrastive"),)
    config.steps = 150
    config.optimizer.learning_rate = ((r"vit/.*|pool/.*", 1e-3), (r".*", 5e-4))


def generative(config: ConfigDict) -> None:
    """Stage 2: matching, contrast and captions through QLLaMA."""
    config.objective = config.data.task = "generative"
    # The language head is not part of stage 1, so it comes from stage 0.
    config.init_from = (dict(path="runs/demo/contrastive_full"), dict(path="runs/demo/language"))
    config.trainable = r"queries|cross/.*|pool2/.*|match_head/.*|logit_scale|llama/.*"
    config.batch_size = 64
    config.steps = 300
    config.optimizer.learning_rate = ((r".*", 1e-3),)


def projector(config: ConfigDict) -> None:
    """Stage 3, first step: the MLP between the frozen tower and the frozen language model."""
    config.objective = config.data.task = "instruct"
    config.model.update(family="chat", projector="mlp")
    config.init_from = (
        dict(path="runs/demo/generative"),
        dict(path="runs/demo/language", rename=((r"llama/(.*)", r"llm/\1"),)),
    )
    config.trainable = r"projector/.*"
    config.data.update(text_length=96, template="plain", augment="none")
    config.batch_size = 64
    config.steps = 60
    config.optimizer.learning_rate = ((r".*", 2e-3),)


def sft(config: ConfigDict) -> None:
    """Stage 3, second step: the language model answers questions; the tower stays frozen."""
    projector(config)
    config.init_from = (dict(path="runs/demo/projector"),)
    config.trainable = r"projector/.*|llm/.*"
    config.data.template = "brief"
    config.steps = 300
    config.optimizer.learning_rate = ((r".*", 1e-3),)


STAGES: dict[str, Callable[[ConfigDict], None]] = {
    stage.__name__: stage
    for stage in (language, contrastive, contrastive_full, generative, projector, sft)
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in STAGES:
        hint = configuration.nearest(arg, STAGES)
        raise configuration.ConfigError(f"demo needs the name of a stage, as demo:sft; {hint}")
    config = common.experiment()
    config.model.update(size="demo", dtype="float32", remat="none", unroll=LAYERS)
    config.optimizer.update(warmup_steps=20, b2=0.98, weight_decay=0.05)
    config.data.update(image_size=48, text_length=64, augment="none")
    with config.ignore_type():
        config.data.sources = (("scenes", 0.8), ("digits", 0.2))
    config.checkpoint.update(every=1000, keep=1)  # the last step is always saved
    config.log_every = 10
    STAGES[arg](config)
    return config
