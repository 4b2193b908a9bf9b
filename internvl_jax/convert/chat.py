"""InternVLChatModel, InternVL 1.1 to 3.5: InternViT, pixel shuffle, `mlp1`, a language model."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import internvit, llama
from internvl_jax.convert.config_json import ConfigError, get, require
from internvl_jax.convert.mapping import Rule, Same, Shape, Transpose
from internvl_jax.models.config import ChatConfig

HOLDS = ChatConfig


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> ChatConfig:
    """ChatConfig of an InternVLChatConfig.

    `force_image_size` is the size of the tiles; the tower keeps the positions it was saved with.
    """
    for name in ("use_backbone_lora", "use_llm_lora"):
        require(config, name, (0,), where)
    vision = get(config, "vision_config", where)
    language = get(config, "llm_config", where)
    vit = internvit.tower_from_json(vision, f"vision_config of {where}")
    llm = llama.config_from_json(language, f"llm_config of {where}")
    return ChatConfig(
        vit=vit,
        llm=llama.with_head_of(llm, shapes, "language_model."),
        projector="pixel_shuffle",
        select_layer=config.get("select_layer", -1),
        shuffle=fold(config.get("downsample_ratio", 0.5), where),
        shuffle_version=config.get("ps_version", "v1"),
        image_size=config.get("force_image_size"),
        template=config.get("template") or "vicuna_v1",
    )


def config_to_json(config: ChatConfig) -> dict[str, Any]:
    """The config.json of the official InternVLChatModel; ConfigError for another projector."""
    if config.projector != "pixel_shuffle":
        raise ConfigError(
            f"the layout chat needs the projector 'pixel_shuffle', not {config.projector!r}; "
            "export with the layout chat-llava"
        )
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": internvit.tower_to_json(config.vit),
        "llm_config": llama.config_to_json(config.llm),
        "hidden_size": config.llm.width,
        "tie_word_embeddings": config.llm.tie_embeddings,
        "select_layer": config.select_layer,
        "downsample_ratio": 1 / config.shuffle,
        "ps_version": config.shuffle_version,
        "force_image_size": config.image_size,
        "template": config.template,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "pad2square": False,
        "dynamic_image_size": False,
        "use_thumbnail": False,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 1,
    }


def rules(config: ChatConfig) -> tuple[Rule, ...]:
    """The whole model."""
    return (
        *internvit.tower_rules(config.vit, "vision_model."),
        *projector_rules("mlp1.0", "mlp1.1", "mlp1.3"),
        *llama.rules(config.llm, "language_model.model.", "llm"),
        *llama.head_rules(config.llm, "language_model.", "llm"),
    )


def projector_rules(norm: str, first: str, second: str) -> tuple[Rule, ...]:
    """LayerNorm and two linear layers between the tower and the language model."""
    return (
        Rule(f"{norm}.weight", "projector/norm/scale", Same()),
        Rule(f"{norm}.bias", "projector/norm/bias", Same()),
        Rule(f"{first}.weight", "projector/fc1/kernel", Transpose()),
        Rule(f"{first}.bias", "projector/fc1/bias", Same()),
        Rule(f"{second}.weight", "projector/fc2/kernel", Transpose()),
        Rule(f"{second}.bias", "projector/fc2/bias", Same()),
    )


def ignore(config: ChatConfig) -> tuple[str, ...]:
    """Keys that need no place: buffers of older language models."""
    return llama.IGNORE


def fold(ratio: float, where: str) -> int:
    """Patches per side that become one, of the ratio in config.json."""
    inverse = round(1 / ratio) if ratio else 0
    if inverse < 1 or abs(ratio * inverse - 1) > 1e-6:
        raise ConfigError(
            f"{where} has downsample_ratio = {ratio!r}; supported is one over a whole number"
        )
    return inverse
