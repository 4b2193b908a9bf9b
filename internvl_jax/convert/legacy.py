"""The older CLIP-style layout: internvl_c_13b_224px and the intern_vit_6b_224px backbone.

The same numbers as in the newer layouts under other names. The text tower is a plain LLaMA without
a language head; the backbone file has no text tower at all. These files came without a
config.json, so head counts, which no shape shows, are those of the published models unless a
config.json with the constructor's arguments ({"model": …, "llama": …}) lies beside them.
"""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import from_shapes, internvit, internvl, llama
from internvl_jax.convert.config_json import ConfigError, get
from internvl_jax.convert.mapping import LeadingOnes, PatchKernel, Rule, Shape
from internvl_jax.models.config import InternVLConfig, VisionConfig, ViTConfig

HOLDS = InternVLConfig | VisionConfig

POOL_HEADS = 16
STORED_PATCH = 14


def config_from_json(
    config: Mapping[str, Any] | None, where: str, shapes: Mapping[str, Shape]
) -> InternVLConfig | VisionConfig:
    """InternVL-C from {"model": {…}, "llama": {…}}; the backbone where there is no "llama".

    Without such a config.json the shapes of the tensors tell.
    """
    if "model" not in (config or {}):
        return config_from_shapes(shapes, where)
    inside = f"'model' of {where}"
    model = get(config, "model", where)
    vit = backbone_from_json(model, inside)
    if "llama" not in config:
        return VisionConfig(vit)
    return InternVLConfig(
        vit=vit,
        llama=llama.config_from_json(config["llama"], f"'llama' of {where}"),
        embed_dim=get(model, "clip_embed_dim", inside),
        pool_heads=get(model, "attn_pool_num_heads", inside),
    )


def backbone_from_json(model: Mapping[str, Any], where: str = "config.json") -> ViTConfig:
    """ViTConfig of the stored backbone, at the size it was trained with."""
    width = get(model, "embed_dim", where)
    resized = "pretrain_size" in model  # such a program resizes what is stored on loading
    return ViTConfig(
        width=width,
        depth=get(model, "depth", where),
        num_heads=get(model, "num_heads", where),
        mlp_dim=int(width * get(model, "mlp_ratio", where)),
        patch_size=STORED_PATCH if resized else model.get("patch_size", STORED_PATCH),
        image_size=model["pretrain_size"] if resized else get(model, "img_size", where),
        qkv_bias=model.get("qkv_bias", False),
        qk_norm=model.get("qk_normalization", True),
    )


def config_to_json(config: InternVLConfig | VisionConfig) -> dict[str, Any]:
    """The constructor's arguments, so that sizes other than the published ones come back."""
    vit = config.vit
    if vit.norm != "rmsnorm":
        raise ConfigError("the older layout has RMSNorm only")
    model = {
        "embed_dim": vit.width,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": vit.mlp_dim / vit.width,
        "img_size": vit.image_size,
        "patch_size": vit.patch_size,
        "qkv_bias": vit.qkv_bias,
        "qk_normalization": vit.qk_norm,
    }
    if isinstance(config, VisionConfig):
        return {"model": model}
    model |= {
        "transformer_width": config.llama.width,
        "attn_pool_num_heads": config.pool_heads,
        "clip_embed_dim": config.embed_dim,
    }
    return {"model": model, "llama": llama.config_to_json(config.llama)}


def config_from_shapes(shapes: Mapping[str, Shape], where: str) -> InternVLConfig | VisionConfig:
    """The configuration of a file without config.json, from its shapes and the published heads."""
    vit = from_shapes.vit(shapes, ("pos_embed", "patch_embed.proj.weight"), "blocks.", where)
    if "transformer.embed_tokens.weight" not in shapes:
        return VisionConfig(vit)
    return InternVLConfig(
        vit=vit,
        llama=from_shapes.llama(shapes, "transformer.", where),
        embed_dim=get(shapes, "text_projection", where)[1],
        pool_heads=POOL_HEADS,
    )


def rules(config: InternVLConfig | VisionConfig) -> tuple[Rule, ...]:
    """InternVL-C, or the backbone alone for a VisionConfig."""
    vit = config.vit
    backbone = (
        Rule("cls_token", "vit/class_embedding", LeadingOnes(2)),
        Rule("pos_embed", "vit/position_embedding", LeadingOnes(1)),
        Rule("patch_embed.proj.weight", "vit/patch_embed/kernel", PatchKernel()),
        Rule("patch_embed.proj.bias", "vit/patch_embed/bias"),
        *internvit.block_rules(vit, "blocks.{i}.", "vit/blocks/", ".gamma"),
    )
    if isinstance(config, VisionConfig):
        return backbone
    return (
        *backbone,
        Rule("text_projection", "text_projection"),
        Rule("logit_scale", "logit_scale"),
        *llama.rules(config.llama, "transformer."),
        *internvl.pool_rules("clip_projector.", "pool/"),
    )


def ignore(config: InternVLConfig | VisionConfig) -> tuple[str, ...]:
    """Keys that need no place: the text tower's buffers.

    The backbone file also carries the pooling head, which the official loaders drop, and a
    fine-tuned backbone its classification head.
    """
    if isinstance(config, VisionConfig):
        return (r"clip_projector\..*", r"norm\..*", r"head\..*")
    return llama.IGNORE
