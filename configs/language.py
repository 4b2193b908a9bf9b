"""Stage 0: a language model on text alone, the part of the paper's pre-trained LLaMA.

    internvl-jax train --config=language --workdir=runs/language
    internvl-jax train --config=language:tiny --workdir=runs/tiny0             (a CPU, a minute)

The paper starts from a multilingual LLaMA-7B and trains none itself, so these values are ours: a
small LLaMA on the embedded multilingual text, for trying the stages without any download.
"""

from ml_collections import ConfigDict

from internvl_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    words = common.options(arg, "tiny")
    config = common.experiment()
    config.objective = "language"
    config.model.update(family="language", size="demo", dtype="float32", remat="none")
    config.optimizer.update(
        learning_rate=((r".*", 2e-3),),
        warmup_steps=50,
        b2=0.95,
        weight_decay=0.1,
    )
    config.batch_size = 128
    config.steps = 600
    config.data.update(task="language", text_length=64, augment="none")
    if "tiny" in words:
        common.tiny(config)
    return config
