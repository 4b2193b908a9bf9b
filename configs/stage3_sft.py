"""Stage 3: instruction tuning of InternVL-Chat, first the projector, then the language model.

    internvl-jax train --config=stage3_sft:projector --workdir=runs/stage3_projector
    internvl-jax train --config=stage3_sft --workdir=runs/stage3
    internvl-jax train --config=stage3_sft:tiny --workdir=runs/tiny3           (a CPU, a minute)

This is the released LLaVA-1.5 recipe: InternViT-6B (frozen), an MLP, Vicuna-13B; the paper used 8
to 32 A100-80G for it (the released scripts' device counts). `:qllama` puts the middleware's query
outputs before the image patches, with the paper's batch of 512 over its 4 M mixture (A.3, Table 3).
`--config.data.packing=N` puts N conversations into a row, and batch_size then counts rows: see
docs/data.md.
Sources: the released training scripts; arXiv 2312.14238, appendix A.3 and Table 9.
"""

from ml_collections import ConfigDict

from internvl_jax.configs import common

IMAGE_TOKENS = 576  # (336 / 14)²

# The mixture of about 4 M conversations (Table 3; names and sizes in thousands from the released
# meta file, OKVQA twice). It also takes the meta file itself: ("chat:data/sft/meta.json", 1.0).
_SIZES = dict(
    llava_instruct=150, vqav2=83, chartqa=18, docvqa=10, stvqa=19, estvqa=17, infovqa=4,
    ocrvqa=206, textcap=21, coco=567, svit=426, okvqa=2 * 9, aokvqa=66, gqa=943, refcoco=284,
    llavar=20, lrv_instruction=68, lrv_chart=7, toloka=39, vsr=8, iconqa=30, ai2d=12, visdial=123,
    llava_mix=665,
)
SFT_MIXTURE = tuple(
    (f"jsonl:data/sft/{name}.jsonl?root=data/images", float(size)) for name, size in _SIZES.items()
)


def get_config(arg: str = "") -> ConfigDict:
    words = common.options(arg, "projector", "qllama", "tiny")
    config = common.experiment()
    config.objective = "instruct"
    config.objective_options = ConfigDict(dict(vocabulary_slices=4))  # of 32,000 logits per token
    config.model.update(
        family="chat",
        size="vicuna_13b",
        projector="mlp",
        select_layer=-4,  # three blocks left out, for the 48-block towers
        image_size=336,
    )
    config.optimizer.update(
        learning_rate=((r".*", 2e-5),),
        warmup_steps=156,  # 3 % of the steps
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.trainable = r"projector/.*|llm/.*"  # the vision tower is frozen
    config.init_from = (dict(path="runs/stage3_projector"),)
    config.batch_size = 128
    config.steps = 5_197  # one pass over LLaVA-Mix-665K
    config.data.update(
        task="instruct",
        image_size=336,
        # 2048 text tokens; the image takes its place after truncation.
        text_length=2048 + IMAGE_TOKENS,
        augment="pad_to_square",  # `--image_aspect_ratio pad` of the released script
        tokenizer="checkpoints/vicuna_13b/tokenizer.model",  # 32,000 pieces
        template="vicuna_v1",
    )
    with config.ignore_type():
        config.data.sources = (
            ("jsonl:data/llava_v1_5_mix665k.jsonl?root=data/images", 1.0),
        )

    if "projector" in words:
        config.trainable = r"projector/.*"
        config.optimizer.learning_rate = ((r".*", 1e-3),)
        config.optimizer.warmup_steps = 66  # 3 % of the steps
        config.batch_size = 256
        config.steps = 2_180  # one pass over LCS-558K
        config.data.template = "plain"  # the caption alone follows the image
        config.data.augment = "center_crop"  # the released script's default here
        with config.ignore_type():
            config.data.sources = (
                ("jsonl:data/blip_laion_cc_sbu_558k.jsonl?root=data/images", 1.0),
            )
        # The decoder is a converted language model, under its name here (`internvl-jax convert`).
        config.init_from = (
            dict(path="checkpoints/vicuna_13b", rename=((r"llama/(.*)", r"llm/\1"),)),
            dict(path="runs/stage1_224"),
        )
    if "qllama" in words:
        _with_middleware(config, projector_only="projector" in words)
    if "tiny" in words:
        common.tiny(config)
        config.model.update(image_size=32, select_layer=-1)  # its tower has two blocks
        config.data.text_length = 96
        if "qllama" in words:
            config.model.middleware = "tiny"
    return config


def _with_middleware(config: ConfigDict, projector_only: bool) -> None:
    """InternVL-Chat with QLLaMA: two MLPs, one for query outputs and one for patches."""
    config.model.update(projector="two_mlp", middleware="14b", select_layer=-1)
    config.model.image_size = config.data.image_size = 224  # Table 9
    config.trainable = r"projector/.*|query_projector/.*"
    if projector_only:
        config.init_from = (*config.init_from, dict(path="runs/stage2"))
    else:
        config.trainable += r"|llm/.*"
    config.batch_size = 512  # A.3
    config.steps = 7_800  # one pass over the mixture of 4 M conversations (Table 3)
    config.optimizer.warmup_steps = 234  # 3 % of the steps
    config.data.text_length = 2048 + 256 + 96  # text, patches, query outputs
    with config.ignore_type():
        config.data.sources = SFT_MIXTURE
