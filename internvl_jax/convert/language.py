"""A language model on its own: LLaMA, Vicuna, Qwen2, Qwen3, InternLM2.

It initialises the text tower, the middleware or the chat decoder of a model of ours.
"""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert import llama
from internvl_jax.convert.mapping import Rule, Shape
from internvl_jax.models.config import LanguageModelConfig

HOLDS = LanguageModelConfig


def config_from_json(
    config: Mapping[str, Any], where: str, shapes: Mapping[str, Shape]
) -> LanguageModelConfig:
    """LanguageModelConfig of a language model's config.json."""
    own = llama.config_from_json(config, where)
    return LanguageModelConfig(llama.with_head_of(own, shapes, ""))


def config_to_json(config: LanguageModelConfig) -> dict[str, Any]:
    """The language model's config.json."""
    return llama.config_to_json(config.llama)


def rules(config: LanguageModelConfig) -> tuple[Rule, ...]:
    """The whole model."""
    return (*llama.rules(config.llama, "model."), *llama.head_rules(config.llama, ""))


def ignore(config: LanguageModelConfig) -> tuple[str, ...]:
    """Keys that need no place: buffers of older classes."""
    return llama.IGNORE
