"""Configurations of towers that came without a config.json, from the shapes of their tensors.

Head counts, which no shape shows, are those of the published models.
"""

import math
from collections.abc import Mapping

from internvl_jax.convert.config_json import ConfigError, get
from internvl_jax.convert.mapping import Shape
from internvl_jax.models.config import LlamaConfig, ViTConfig

HEAD_DIM = {"rmsnorm": 128, "layernorm": 64}  # InternViT-6B and -300M
LLAMA_HEAD_DIM = 128


def vit(shapes: Mapping[str, Shape], embeddings: tuple[str, str], blocks: str, where: str):
    """ViTConfig; `embeddings` are the keys of positions and patch kernel, `blocks` a prefix."""
    position, kernel = embeddings
    tokens, width = get(shapes, position, where)[1:]
    patch = get(shapes, kernel, where)[-1]
    norm = "layernorm" if f"{blocks}0.norm1.bias" in shapes else "rmsnorm"
    return ViTConfig(
        width=width,
        depth=_depth(shapes, blocks),
        num_heads=_heads(width, HEAD_DIM[norm], where),
        mlp_dim=get(shapes, f"{blocks}0.mlp.fc1.weight", where)[0],
        patch_size=patch,
        image_size=patch * math.isqrt(tokens - 1),
        norm=norm,
        qkv_bias=f"{blocks}0.attn.qkv.bias" in shapes,
        qk_norm=f"{blocks}0.attn.q_norm.weight" in shapes,
    )


def llama(shapes: Mapping[str, Shape], prefix: str, where: str) -> LlamaConfig:
    """LlamaConfig; `prefix` is what stands before `embed_tokens`."""
    vocab, width = get(shapes, f"{prefix}embed_tokens.weight", where)
    return LlamaConfig(
        vocab_size=vocab,
        width=width,
        depth=_depth(shapes, f"{prefix}layers."),
        num_heads=_heads(width, LLAMA_HEAD_DIM, where),
        mlp_dim=get(shapes, f"{prefix}layers.0.mlp.gate_proj.weight", where)[0],
    )


def _depth(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in shapes if key.startswith(prefix)})


def _heads(width: int, head_dim: int, where: str) -> int:
    if width % head_dim:
        raise ConfigError(
            f"{where} has width {width}, which heads of {head_dim} do not divide; a config.json "
            "that describes the towers must lie beside it"
        )
    return width // head_dim
