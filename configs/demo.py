"""The embedded job: every stage of the paper in miniature, in minutes on two CPU cores.

    internvl-jax demo                                                          (all stages)
    internvl-jax train --config=demo:contrastive --workdir=runs/demo/contrastive

One stage per argument, in the order of `STAGES`. The architecture is the real one, small. One thing
differs from the paper: its stage 2 freezes the vision tower and QLLaMA's language model, ours the
vision tower alone. The embedded language model is too small to have learnt to write before.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from internvl_jax import configuration
from internvl_jax.configs import common

LAYERS = 4
IMAGE_TOKENS = 9  # 48 pixels in patches of 16


def language(config: ConfigDict) -> None:
    """Stage 0: the paper starts from a pre-trained multilingual LLaMA; this makes a small one."""
    config.objective = config.data.task = "language"
    config.model.family = "language"
    config.batch_size = 64
    config.steps = 80
    config.optimizer.learning_rate = ((r".*", 2e-3),)


def contrastive(config: ConfigDict) -> None:
    """Stage 1 in English alone: one language binds words to pictures three times sooner than four.

    No image tokens are removed: of the nine here, none is spare.
    """
    config.objective = config.data.task = "contrastive"
    config.model.num_queries = 0
    config.init_from = (dict(path="runs/demo/language"),)
    config.data.languages = ("en",)
    config.data.text_length = 17  # "summarize:" and the longest caption, a Chinese one
    config.batch_size = 128
    config.steps = 180
    config.optimizer.learning_rate = ((r".*", 1e-3),)


def multilingual(config: ConfigDict) -> None:
    """The rest of stage 1, with all languages."""
    contrastive(config)
    config.data.languages = ("en", "zh", "ko", "es")
    config.init_from = (dict(path="runs/demo/contrastive"),)
    config.steps = 460


def generative(config: ConfigDict) -> None:
    """Stage 2: matching, contrast and captions through QLLaMA."""
    config.objective = config.data.task = "generative"
    # The embedded data has no empty captions, which are told by the released tokenizer's lengths.
    config.objective_options = ConfigDict(dict(empty_caption_tokens=0, empty_text_tokens=0))
    # The language head is not part of stage 1, so it comes from stage 0.
    config.init_from = (dict(path="runs/demo/multilingual"), dict(path="runs/demo/language"))
    config.trainable = r"(?!vit/).*"
    config.batch_size = 64
    config.steps = 400
    config.optimizer.learning_rate = ((r".*", 1e-3),)


def projector(config: ConfigDict) -> None:
    """Stage 3, first step: the MLP between the frozen tower and the frozen language model."""
    config.objective = config.data.task = "instruct"
    config.model.update(family="chat", projector="mlp")
    config.init_from = (dict(path="runs/demo/generative", rename=((r"llama/(.*)", r"llm/\1"),)),)
    config.trainable = r"projector/.*"
    config.data.update(text_length=IMAGE_TOKENS + 24, template="plain", augment="none")
    config.batch_size = 64
    config.steps = 20
    config.optimizer.warmup_steps = 5
    config.optimizer.learning_rate = ((r".*", 2e-3),)


def sft(config: ConfigDict) -> None:
    """Stage 3, second step: the language model answers questions; the tower stays frozen."""
    projector(config)
    config.init_from = (dict(path="runs/demo/projector"),)
    config.trainable = r"projector/.*|llm/.*"
    config.data.template = "brief"
    config.steps = 520
    config.optimizer.warmup_steps = 20
    config.optimizer.learning_rate = ((r".*", 1e-3),)


STAGES: dict[str, Callable[[ConfigDict], None]] = {
    stage.__name__: stage
    for stage in (language, contrastive, multilingual, generative, projector, sft)
}


def get_config(arg: str = "") -> ConfigDict:
    if arg not in STAGES:
        hint = configuration.nearest(arg, STAGES)
        raise configuration.ConfigError(f"demo needs the name of a stage, as demo:sft; {hint}")
    config = common.experiment()
    config.model.update(size="demo", dtype="float32", remat="none", unroll=LAYERS)
    config.optimizer.update(warmup_steps=20, b2=0.98, weight_decay=0.05)
    config.data.update(image_size=48, text_length=20, augment="none")
    with config.ignore_type():
        config.data.sources = (("scenes", 0.8), ("digits", 0.2))
    config.checkpoint.update(every=1000, keep=1)  # the last step is always saved
    config.log_every = 10
    STAGES[arg](config)
    return config
