"""InternVisionModel: InternViT-6B and InternViT-300M, alone or as the tower of a larger model."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert.config_json import get, require
from internvl_jax.convert.mapping import LeadingOnes, PatchKernel, Rule, Same, Shape, Transpose
from internvl_jax.models.config import VisionConfig, ViTConfig

HOLDS = VisionConfig

NORMS = {"rms_norm": "rmsnorm", "layer_norm": "layernorm"}


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> VisionConfig:
    """VisionConfig of the tower on its own."""
    return VisionConfig(tower_from_json(config, where))


def config_to_json(config: VisionConfig) -> dict[str, Any]:
    """The config.json of the tower on its own."""
    return tower_to_json(config.vit)


def rules(config: VisionConfig) -> tuple[Rule, ...]:
    """The tower on its own."""
    return tower_rules(config.vit)


def ignore(config: VisionConfig) -> tuple[str, ...]:
    """Keys that need no place: none."""
    return ()


def tower_from_json(config: Mapping[str, Any], where: str = "config.json") -> ViTConfig:
    """ViTConfig of an InternVisionConfig. Rates that only act in training are kept."""
    require(config, "hidden_act", ("gelu",), where)
    require(config, "num_channels", (3,), where)
    require(config, "norm_type", tuple(NORMS), where)
    return ViTConfig(
        width=get(config, "hidden_size", where),
        depth=get(config, "num_hidden_layers", where),
        num_heads=get(config, "num_attention_heads", where),
        mlp_dim=get(config, "intermediate_size", where),
        patch_size=get(config, "patch_size", where),
        image_size=get(config, "image_size", where),
        norm=NORMS[config.get("norm_type", "rms_norm")],
        qkv_bias=config.get("qkv_bias", False),
        qk_norm=config.get("qk_normalization", True),
        drop_path=config.get("drop_path_rate", 0.0),
        eps=config.get("layer_norm_eps", 1e-6),
    )


def tower_to_json(config: ViTConfig) -> dict[str, Any]:
    """The InternVisionConfig of a ViTConfig."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "hidden_act": "gelu",
        "norm_type": {ours: theirs for theirs, ours in NORMS.items()}[config.norm],
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm,
        "layer_norm_eps": config.eps,
        "drop_path_rate": config.drop_path,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_factor": 0.1,
        "initializer_range": 0.02,
        "use_flash_attn": False,
    }


def tower_rules(config: ViTConfig, torch: str = "", ours: str = "vit") -> tuple[Rule, ...]:
    """The tower; `torch` is the prefix before `embeddings` and `encoder`."""
    embeddings = f"{torch}embeddings."
    return (
        Rule(f"{embeddings}class_embedding", f"{ours}/class_embedding", LeadingOnes(2)),
        Rule(f"{embeddings}position_embedding", f"{ours}/position_embedding", LeadingOnes(1)),
        Rule(f"{embeddings}patch_embedding.weight", f"{ours}/patch_embed/kernel", PatchKernel()),
        Rule(f"{embeddings}patch_embedding.bias", f"{ours}/patch_embed/bias"),
        *block_rules(config, f"{torch}encoder.layers.{{i}}.", f"{ours}/blocks/", ""),
    )


def block_rules(config: ViTConfig, torch: str, ours: str, scale: str) -> tuple[Rule, ...]:
    """The stacked blocks; `scale` is what follows `ls1` in the torch key."""
    layers = tuple(range(config.depth))

    def linear(torch_name: str, path: str, bias: bool) -> list[Rule]:
        table = [Rule(f"{torch}{torch_name}.weight", f"{ours}{path}/kernel", Transpose(), layers)]
        if bias:
            table.append(Rule(f"{torch}{torch_name}.bias", f"{ours}{path}/bias", Same(), layers))
        return table

    table = linear("attn.qkv", "attn/qkv", config.qkv_bias)
    table += linear("attn.proj", "attn/proj", True)
    table += linear("mlp.fc1", "mlp/fc1", True) + linear("mlp.fc2", "mlp/fc2", True)
    for name in ("norm1", "norm2"):
        table.append(Rule(f"{torch}{name}.weight", f"{ours}{name}/scale", Same(), layers))
        if config.norm == "layernorm":
            table.append(Rule(f"{torch}{name}.bias", f"{ours}{name}/bias", Same(), layers))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            torch_name = f"{torch}attn.{name}.weight"
            table.append(Rule(torch_name, f"{ours}attn/{name}/scale", Same(), layers))
    for name in ("ls1", "ls2"):
        table.append(Rule(f"{torch}{name}{scale}", f"{ours}{name}", Same(), layers))
    return tuple(table)
