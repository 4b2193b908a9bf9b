"""Fine-tune InternVL-G for image-text retrieval (Flickr30K, Flickr30K-CN, COCO).

    internvl-jax train --config=finetune_retrieval --workdir=runs/flickr30k
    internvl-jax train --config=finetune_retrieval:lora --workdir=runs/flickr30k_lora
    internvl-jax train --config=finetune_retrieval:tiny --workdir=runs/tiny_retrieval

All 14 B parameters at 364 pixels; the paper used 32 A100-80G. `:lora` trains rank-16 adapters at
224 pixels, which the released scripts do on four such devices (their authors mark it as untuned).
The released DeepSpeed file probably replaces cosine and layer decay by a linear schedule with one
rate; this config follows the paper. Sources: arXiv 2312.14238, Table 21; released scripts.
"""

from ml_collections import ConfigDict

from internvl_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    words = common.options(arg, "lora", "tiny")
    config = common.experiment()
    config.objective = "retrieval"
    config.model.update(image_size=364, drop_path=0.3, drop_path_schedule="linear")
    config.init_from = (dict(path="checkpoints/internvl_14b_224px"),)  # positions 16² → 26²
    config.optimizer.update(
        learning_rate=((r".*", 1e-6),),
        warmup_steps=100,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        layer_decay=(("vit", 0.9), ("llama", 0.9)),
    )
    config.batch_size = 1024  # 32 devices × 32
    config.steps = 1_416  # 10 passes over Flickr30K's 145,000 captions; COCO: 5 passes, 2,766 steps
    config.data.update(
        task="retrieval",
        image_size=364,
        augment="random_resized_crop_and_flip",  # 0.5–1.0 of the area; half of them mirrored
        tokenizer="checkpoints/internvl_14b_224px/tokenizer.model",  # 49,954 pieces
    )
    with config.ignore_type():
        config.data.sources = (("jsonl:data/flickr30k_train.jsonl", 1.0),)

    if "lora" in words:
        with config.ignore_type():
            config.model.lora = ConfigDict(dict(rank=16))  # alpha 32
        config.model.update(image_size=224, drop_path=0.0)
        config.data.image_size = 224
        config.trainable = r".*/lora_[ab]"
        config.optimizer.layer_decay = ()
        config.batch_size = 128  # 4 devices × 32
    if "tiny" in words:
        common.tiny(config)
        config.model.image_size = 32
        if "lora" in words:
            config.model.lora.rank = 2
    return config
