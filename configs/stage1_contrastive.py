"""Stage 1: contrastive pre-training of InternViT-6B with a LLaMA-7B text tower.

    internvl-jax train --config=stage1_contrastive --workdir=runs/stage1
    internvl-jax train --config=stage1_contrastive:224 --workdir=runs/stage1_224
    internvl-jax train --config=stage1_contrastive:tiny --workdir=runs/tiny    (a CPU, a minute)

The first run trains at 196 pixels with half of the image tokens removed, the second continues it
at 224 pixels with all of them. The paper used 640 A100-80G.
Sources: arXiv 2312.14238, Table 20 and appendix A.3; Table 2 for the data.
"""

from ml_collections import ConfigDict

from internvl_jax.configs import common

# 0.5 B of the 28.7 B samples are seen at 224 pixels: 500e6 / 163,840 steps.
STEPS_224 = 3_052


def get_config(arg: str = "") -> ConfigDict:
    words = common.options(arg, "224", "tiny")
    config = common.experiment()
    config.objective = "contrastive"
    # Half of the image tokens removed (A.3). 163,840² similarities would take 0.4 GB per chip.
    config.objective_options = ConfigDict(dict(mask_ratio=0.5, ring=True))
    config.model.update(
        num_queries=0,  # InternVL-C: no middleware yet
        image_size=196,
        drop_path=0.2,  # Table 20
        drop_path_schedule="uniform",  # Table 20; every released class has a linear ramp
    )
    # The text tower starts from a multilingual LLaMA-7B (A.3), the vision tower at random. The
    # published folder becomes this one by `internvl-jax convert … --layout=jax`.
    config.init_from = (dict(path="checkpoints/chinese_llama_7b"),)
    config.optimizer.update(
        learning_rate=(
            (r"vit/.*|pool/.*", 1e-3),  # image side (Table 20; the head's rate is not stated)
            (r".*", 1e-4),  # text tower, text projection, temperature (likewise)
        ),
        warmup_steps=5_000,
        b1=0.9,
        b2=0.95,
        weight_decay=0.1,
        clip_norm=1.0,  # not stated
    )
    config.batch_size = 163_840  # "164K" = 640 devices × 256
    config.chunks = 10  # 64 images at a time on each of 256 chips
    config.steps = 175_000 - STEPS_224  # 175K in all, 28.7 B samples
    config.data.update(
        task="contrastive",
        image_size=196,
        decoder="fast",
        augment="random_resized_crop",  # the only one (Table 20); its scale is not stated
        tokenizer="checkpoints/chinese_llama_7b/tokenizer.model",  # 49,954 pieces
    )
    with config.ignore_type():
        # Tars as img2dataset writes them. Weight: millions of pairs after filtering (Table 2). What
        # `data filter` and `data dedup` kept is applied by ?keep=LIST behind the pattern.
        config.data.sources = (
            ("webdataset:data/laion-en/*.tar", 1940.0),
            ("webdataset:data/laion-coco/*.tar", 550.0),
            ("webdataset:data/coyo/*.tar", 535.0),
            ("webdataset:data/cc12m/*.tar", 11.1),
            ("webdataset:data/cc3m/*.tar", 2.6),
            ("webdataset:data/sbu/*.tar", 1.0),
            ("webdataset:data/wukong/*.tar?language=zh", 69.4),
            ("webdataset:data/laion-multi/*.tar?language=mul", 1870.0),
        )
    config.mesh.update(replica=-1, fsdp=128)  # a pod of n × 128 chips

    if "224" in words:
        config.init_from = (dict(path="runs/stage1"),)  # positions are resized 14² → 16²
        config.objective_options.mask_ratio = 0.0
        config.model.image_size = config.data.image_size = 224
        config.steps = STEPS_224
        # The course of the rate at the switch is not stated: a hundredth of the peaks, our choice.
        config.optimizer.learning_rate = ((r"vit/.*|pool/.*", 1e-5), (r".*", 1e-6))
        config.optimizer.warmup_steps = 300
    if "tiny" in words:
        common.tiny(config)
        config.model.image_size = 32
    return config
