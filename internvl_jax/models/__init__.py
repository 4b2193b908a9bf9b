"""InternViT, LLaMA, QLLaMA, InternVL-C, InternVL-G and InternVL-Chat."""

from internvl_jax.models.config import (
    ChatConfig,
    InternVLConfig,
    LanguageModelConfig,
    LlamaConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    ViTConfig,
    from_dict,
    to_dict,
)
from internvl_jax.models.init import abstract, bind, create, shardings

__all__ = [
    "ChatConfig",
    "InternVLConfig",
    "LanguageModelConfig",
    "LlamaConfig",
    "LoraConfig",
    "ModelConfig",
    "ViTConfig",
    "VisionConfig",
    "abstract",
    "bind",
    "create",
    "from_dict",
    "shardings",
    "to_dict",
]
