"""InternVLForConditionalGeneration: InternVL as `transformers` itself implements it.

The same model as in the layout `chat`, with query, key and value of the tower apart. Files of
released models (and what `transformers` saves) put the language model's name first, the class's own
state dict has `model.` before everything; a model keeps the names it came with.
"""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import chat, llama
from internvl_jax.convert.config_json import ConfigError, get, require
from internvl_jax.convert.internvit import NORMS
from internvl_jax.convert.mapping import (
    JoinedRows,
    LeadingOnes,
    PatchKernel,
    Rule,
    Same,
    Shape,
    Transpose,
)
from internvl_jax.models.config import ChatConfig, ViTConfig

HOLDS = ChatConfig

QK_EPS = 1e-6  # fixed in that class
NEWER, OLDER = "model.language_model.", "language_model.model."
IMAGE_TOKEN_ID = 151667  # <IMG_CONTEXT> in the vocabulary of the released models


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> ChatConfig:
    """ChatConfig of an InternVLConfig of `transformers`, with its defaults for what is left out."""
    require(config, "projector_hidden_act", ("gelu",), where)
    require(config, "vision_feature_select_strategy", ("default",), where)
    layer = config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ConfigError(f"{where} has vision_feature_layer = {layer!r}; supported is one layer")
    text = get(config, "text_config", where)
    tied = text.get("tie_word_embeddings", False) or config.get("tie_word_embeddings", True)
    text = {**text, "tie_word_embeddings": tied}
    llm = llama.config_from_json(text, f"text_config of {where}", default="qwen2")
    if llm.architecture == "internlm2":
        raise ConfigError(f"text_config of {where} is InternLM2, which this layout does not have")
    class_names = any(key.startswith(NEWER) for key in shapes)
    prefix = "" if class_names else "language_model."
    return ChatConfig(
        vit=tower_from_json(get(config, "vision_config", where), f"vision_config of {where}"),
        llm=llama.with_head_of(llm, shapes, prefix),
        projector="pixel_shuffle",
        select_layer=layer,
        shuffle=chat.fold(config.get("downsample_ratio", 0.5), where),
        shuffle_version="v2",
        image_token_id=config.get("image_token_id", IMAGE_TOKEN_ID),
        template="internvl2_5",
        class_names=class_names,
    )


def tower_from_json(config: Mapping[str, Any], where: str = "config.json") -> ViTConfig:
    """ViTConfig of an InternVLVisionConfig of `transformers`, with its defaults."""
    require(config, "hidden_act", ("gelu",), where)
    require(config, "num_channels", (3,), where)
    require(config, "norm_type", ("layer_norm", "rms_norm"), where)
    require(config, "use_mask_token", (False,), where)
    require(config, "use_absolute_position_embeddings", (True,), where)
    require(config, "use_mean_pooling", (True,), where)
    eps = config.get("layer_norm_eps", 1e-6)
    return ViTConfig(
        width=config.get("hidden_size", 1024),
        depth=config.get("num_hidden_layers", 24),
        num_heads=config.get("num_attention_heads", 16),
        mlp_dim=config.get("intermediate_size", 4096),
        patch_size=_side(config, "patch_size", 14, where),
        image_size=_side(config, "image_size", 448, where),
        norm=NORMS[config.get("norm_type", "layer_norm")],
        qkv_bias=config.get("attention_bias", False),
        qk_norm=config.get("use_qk_norm", False),
        qk_eps=None if eps == QK_EPS else QK_EPS,
        eps=eps,
    )


def _side(config: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """A size given as one number or as [height, width]."""
    value = config.get(name, default)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ConfigError(f"{where} has {name} = {value!r}; supported are squares")
    return sides.pop()


def config_to_json(config: ChatConfig) -> dict[str, Any]:
    """The config.json of `transformers`; ConfigError for what that class cannot be."""
    vit = config.vit
    problems = [
        (config.projector != "pixel_shuffle", f"the projector {config.projector!r}"),
        (config.shuffle_version != "v2", f"shuffle_version {config.shuffle_version!r}"),
        (config.llm.architecture == "internlm2", "an InternLM2 language model"),
        (
            vit.qk_norm and (vit.qk_eps or vit.eps) != QK_EPS,
            f"norms of q and k with another eps than {QK_EPS}",
        ),
    ]
    wrong = [what for bad, what in problems if bad]
    if wrong:
        raise ConfigError(f"the layout hf has no place for {', '.join(wrong)}; use another layout")
    image_token_id = IMAGE_TOKEN_ID if config.image_token_id is None else config.image_token_id
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "hidden_size": vit.width,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.num_heads,
            "intermediate_size": vit.mlp_dim,
            "patch_size": [vit.patch_size] * 2,
            "image_size": [vit.image_size] * 2,
            "norm_type": {ours: theirs for theirs, ours in NORMS.items()}[vit.norm],
            "layer_norm_eps": vit.eps,
            "attention_bias": vit.qkv_bias,
            "use_qk_norm": vit.qk_norm,
            "hidden_act": "gelu",
            "num_channels": 3,
            "layer_scale_init_value": vit.layer_scale,
            "use_mean_pooling": True,
        },
        "text_config": llama.config_to_json(config.llm),
        "downsample_ratio": 1 / config.shuffle,
        "image_seq_length": config.tokens_per_image,
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.llm.tie_embeddings,
    }


def rules(config: ChatConfig) -> tuple[Rule, ...]:
    """The whole model."""
    before, head = ("model.", "") if config.class_names else ("", "language_model.")
    projector = f"{before}multi_modal_projector."
    return (
        *tower_rules(config.vit, f"{before}vision_tower."),
        *chat.projector_rules(*(projector + n for n in ("layer_norm", "linear_1", "linear_2"))),
        *llama.rules(config.llm, NEWER if config.class_names else OLDER, "llm"),
        *llama.head_rules(config.llm, head, "llm"),
    )


def tower_rules(config: ViTConfig, torch: str) -> tuple[Rule, ...]:
    """The tower; `torch` is the prefix before `embeddings` and `encoder`."""
    layers = tuple(range(config.depth))
    embeddings, one = f"{torch}embeddings.", f"{torch}encoder.layer.{{i}}."
    patches = f"{embeddings}patch_embeddings.projection."
    table = [
        Rule(f"{embeddings}cls_token", "vit/class_embedding", LeadingOnes(2)),
        Rule(f"{embeddings}position_embeddings", "vit/position_embedding", LeadingOnes(1)),
        Rule(f"{patches}weight", "vit/patch_embed/kernel", PatchKernel()),
        Rule(f"{patches}bias", "vit/patch_embed/bias"),
    ]
    kinds = {"weight": ("kernel", Transpose()), "bias": ("bias", Same())}
    for kind, (leaf, op) in kinds.items():
        if kind == "weight" or config.qkv_bias:
            names = tuple(f"{one}attention.{name}_proj.{kind}" for name in "qkv")
            table.append(Rule(names, f"vit/blocks/attn/qkv/{leaf}", JoinedRows(op), layers))
        for name, path in (
            ("attention.projection_layer", "attn/proj"),
            ("mlp.fc1", "mlp/fc1"),
            ("mlp.fc2", "mlp/fc2"),
        ):
            table.append(Rule(f"{one}{name}.{kind}", f"vit/blocks/{path}/{leaf}", op, layers))
    scales = [("layernorm_before.weight", "norm1/scale"), ("layernorm_after.weight", "norm2/scale")]
    if config.norm == "layernorm":
        scales += [("layernorm_before.bias", "norm1/bias"), ("layernorm_after.bias", "norm2/bias")]
    if config.qk_norm:
        scales += [(f"attention.{n}_norm.weight", f"attn/{n}_norm/scale") for n in "qk"]
    scales += [("lambda_1", "ls1"), ("lambda_2", "ls2")]
    table += [Rule(one + name, f"vit/blocks/{path}", Same(), layers) for name, path in scales]
    return tuple(table)


def ignore(config: ChatConfig) -> tuple[str, ...]:
    """Keys that need no place: buffers of older language models."""
    return llama.IGNORE
