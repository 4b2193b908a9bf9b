"""InternVL-14B (InternVLModel): InternViT, QLLaMA, the two pooling heads and the matching head."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import internvit, llama
from internvl_jax.convert.config_json import ConfigError, get
from internvl_jax.convert.mapping import LeadingOnes, Rule, Same, Shape, Transpose
from internvl_jax.models.config import InternVLConfig, LlamaConfig

HOLDS = InternVLConfig


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> InternVLConfig:
    """InternVLConfig of an InternVLConfig in the official sense.

    `force_image_size` wins over the tower's own size, because a checkpoint that carries it was
    saved with resized position embeddings. The cross-attention frequency is read from the top
    level first: the official class leaves it out of `qllama_config` when it saves.
    """
    vision = dict(get(config, "vision_config", where))
    text = get(config, "qllama_config", where)
    vision["image_size"] = config.get("force_image_size") or get(
        vision, "image_size", f"vision_config of {where}"
    )
    queries = get(config, "num_query_token", where)
    every = config.get("cross_attention_frequency", text.get("cross_attention_frequency", 2))
    for name, value in (
        ("vision_hidden_size", vision["hidden_size"]),
        ("num_query_token", queries),
    ):
        if text.get(name, value) != value:
            raise ConfigError(f"qllama_config of {where} has {name} = {text[name]}, not {value}")
    return InternVLConfig(
        vit=internvit.tower_from_json(vision, f"vision_config of {where}"),
        llama=llama.config_from_json(text, f"qllama_config of {where}"),
        embed_dim=get(config, "clip_embed_dim", where),
        pool_heads=get(config, "attn_pool_num_heads", where),
        num_queries=queries,
        cross_every=every,
    )


def config_to_json(config: InternVLConfig) -> dict[str, Any]:
    """The config.json of the official InternVLModel.

    Raises ConfigError for InternVL-C, which has no place in this layout.
    """
    if not config.num_queries:
        raise ConfigError(
            "InternVL-C has no queries, which the layout internvl-14b needs; "
            "export it with the layout internvl-c-legacy"
        )
    vision = internvit.tower_to_json(config.vit)
    # The two extra entries of qllama_config let sizes other than the published ones be described.
    text = llama.config_to_json(config.llama) | {
        "num_query_token": config.num_queries,
        "vision_hidden_size": config.vit.width,
        "cross_attention_frequency": config.cross_every,
    }
    return {
        "architectures": ["InternVLModel"],
        "model_type": "internvl",
        "vision_config": vision,
        "qllama_config": text,
        "hidden_size": config.llama.width,
        "clip_embed_dim": config.embed_dim,
        "attn_pool_num_heads": config.pool_heads,
        "num_query_token": config.num_queries,
        "cross_attention_frequency": config.cross_every,
        "label_smoothing": 0.0,
        "use_backbone_lora": 0,
        "use_qllama_lora": 0,
        "force_image_size": None,
        "initializer_range": 0.02,
        "max_txt_len": 32,
    }


def rules(
    config: InternVLConfig, vision: str = "vision_model.", text: str = "qllama."
) -> tuple[Rule, ...]:
    """The whole model; the prefixes of its two towers differ in checkpoints with adapters."""
    return (
        Rule("query_tokens", "queries", LeadingOnes(1)),
        Rule("text_projection", "text_projection"),
        Rule("logit_scale", "logit_scale"),
        *internvit.tower_rules(config.vit, vision),
        *qllama_rules(config.llama, config.cross_every, text),
        *pool_rules("clip_projector.", "pool/"),
        *pool_rules("clip_projector2.", "pool2/"),
        Rule("itm_head.weight", "match_head/kernel", Transpose()),
        Rule("itm_head.bias", "match_head/bias"),
    )


def ignore(config: InternVLConfig) -> tuple[str, ...]:
    """Keys that need no place: buffers of older LLaMA classes."""
    return llama.IGNORE


def qllama_rules(config: LlamaConfig, cross_every: int, torch: str) -> tuple[Rule, ...]:
    """QLLaMA: the LLaMA stack, its head, and cross-attention in every k-th layer."""
    return (
        *llama.rules(config, f"{torch}model."),
        *llama.head_rules(config, torch),
        *cross_rules(config, cross_every, f"{torch}model."),
    )


def cross_rules(config: LlamaConfig, cross_every: int, torch: str) -> tuple[Rule, ...]:
    """Cross-attention in every k-th layer; `torch` is the prefix before `layers`."""
    crossing = tuple(range(0, config.depth, cross_every))
    cross = f"{torch}layers.{{i}}.cross_attn."
    return (
        *(
            Rule(f"{cross}{name}.weight", f"cross/{name}/scale", Same(), crossing)
            for name in ("norm1", "norm2")
        ),
        *(
            Rule(f"{cross}{name}_proj.weight", f"cross/{name}/kernel", Transpose(), crossing)
            for name in ("q", "k", "v", "o")
        ),
    )


def pool_rules(torch: str, ours: str) -> tuple[Rule, ...]:
    """An attention-pooling head: three norms, three projections with free-standing biases."""
    table = []
    for name in ("q", "k", "v"):
        table += [
            Rule(f"{torch}norm1_{name}.weight", f"{ours}norm_{name}/scale"),
            Rule(f"{torch}norm1_{name}.bias", f"{ours}norm_{name}/bias"),
            Rule(f"{torch}cross_attn.{name}.weight", f"{ours}{name}/kernel", Transpose()),
            Rule(f"{torch}cross_attn.{name}_bias", f"{ours}{name}/bias"),
        ]
    table += [
        Rule(f"{torch}cross_attn.proj.weight", f"{ours}proj/kernel", Transpose()),
        Rule(f"{torch}cross_attn.proj.bias", f"{ours}proj/bias"),
    ]
    return tuple(table)
