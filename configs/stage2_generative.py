"""Stage 2: generative pre-training of the language middleware QLLaMA.

    internvl-jax train --config=stage2_generative --workdir=runs/stage2
    internvl-jax train --config=stage2_generative:tiny --workdir=runs/tiny2    (a CPU, a minute)

Contrastive, matching and captioning losses in one pass of the middleware, summed without weights.
Both towers stay frozen, so 1 B of the 14 B parameters are trained. The paper used 160 A100-80G.
Sources: arXiv 2312.14238, Table 20 and section 3.3; what is frozen also follows the released code.
"""

from ml_collections import ConfigDict

from internvl_jax.configs import common


def get_config(arg: str = "") -> ConfigDict:
    words = common.options(arg, "tiny")
    config = common.experiment()
    config.objective = "generative"
    config.objective_options = ConfigDict(
        # The released smoothing; 49,954 logits per token, an eighth of them at a time; matching's
        # negatives are captions of random other images as released ("hardest": of the batch's).
        dict(label_smoothing=0.0, ring=True, vocabulary_slices=8, itm_negatives="random")
    )
    config.model.update(image_size=224, drop_path=0.0)
    # Queries, cross-attention and the two heads are new; all else comes from stage 1, except the
    # language head, which stage 1 does not hold and the LLaMA checkpoint does.
    config.init_from = (
        dict(path="runs/stage1_224"),
        dict(path="checkpoints/chinese_llama_7b"),
    )
    config.trainable = r"queries|cross/.*|pool2/.*|match_head/.*|logit_scale"
    config.optimizer.update(
        learning_rate=((r".*", 5e-5),),
        warmup_steps=2_000,
        b1=0.9,
        b2=0.98,
        weight_decay=0.05,
        clip_norm=1.0,  # not stated
    )
    config.batch_size = 20_480  # "20K" = 160 devices × 128
    config.steps = 80_000  # 1.6 B samples
    config.data.update(
        task="generative",
        image_size=224,
        decoder="fast",
        augment="random_resized_crop",
        tokenizer="checkpoints/chinese_llama_7b/tokenizer.model",  # 49,954 pieces
    )
    with config.ignore_type():
        # Weight: millions of pairs after filtering (Table 2). Of the three largest sets the caption
        # rules keep a part, which `data filter --rules=stage2` lists.
        config.data.sources = (
            ("webdataset:data/laion-en/*.tar?keep=data/laion-en-stage2.npy", 91.0),
            ("webdataset:data/laion-coco/*.tar", 550.0),
            ("webdataset:data/coyo/*.tar?keep=data/coyo-stage2.npy", 200.0),
            ("webdataset:data/cc12m/*.tar", 11.1),
            ("webdataset:data/cc3m/*.tar", 2.6),
            ("webdataset:data/sbu/*.tar", 1.0),
            ("webdataset:data/wukong/*.tar?language=zh", 69.4),
            (
                "webdataset:data/laion-multi/*.tar?keep=data/laion-multi-stage2.npy&language=mul",
                100.0,
            ),
        )
    config.mesh.update(replica=-1, fsdp=128)  # a pod of n × 128 chips
    if "tiny" in words:
        common.tiny(config)
        config.model.image_size = 32
    return config
