"""The README.md beside converted weights: what they are, in numbers, and what is left to add."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from internvl_jax.models.config import ModelConfig

KINDS = {
    "InternVLConfig": ("InternVL", "zero-shot-image-classification"),
    "ChatConfig": ("InternVL-Chat", "image-text-to-text"),
    "LanguageModelConfig": ("language model", "text-generation"),
    "VisionConfig": ("InternViT", "image-feature-extraction"),
}


def text(
    config: ModelConfig, layout: str, tensors: Iterable[tuple[tuple[int, ...], str]]
) -> str:
    """A model card in Markdown with the front matter that model hubs read.

    tensors: (shape, dtype) of each tensor as stored.
    """
    tensors = list(tensors)
    parameters = sum(math.prod(shape) for shape, _ in tensors)
    dtypes = ", ".join(sorted({dtype for _, dtype in tensors}))
    name, task = KINDS[type(config).__name__]
    rows = "".join(f"| {label} | {value} |\n" for label, value in _facts(config))
    return f"""---
license: other
pipeline_tag: {task}
tags: [internvl]
---

# {name}, {parameters / 1e9:.2f} billion parameters

| | |
|---|---|
| parameters | {parameters:,} |
| stored as | {dtypes}, layout `{layout}` |
{rows}
## To be filled in by whoever publishes these weights

- What the model was initialised from, and the licences of those weights.
- What it was trained on, for how long, with which configuration.
- What it was evaluated on, with the figures and how to reproduce them.
- What it is meant for, what it is not fit for, and its known limits.
"""


def _facts(config: ModelConfig) -> list[tuple[str, str]]:
    """One row for each part of the model."""
    facts = []
    parts: Mapping[str, str] = {
        "vit": "vision tower",
        "llama": "language side",
        "llm": "language model",
        "middleware": "middleware",
    }
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if field.name not in parts or part is None:
            continue
        part = getattr(part, "llama", part)
        value = f"{part.depth} layers, width {part.width}, {part.num_heads} heads"
        if hasattr(part, "patch_size"):
            value += f", {part.image_size} px in patches of {part.patch_size}"
        if hasattr(part, "vocab_size"):
            value += f", vocabulary {part.vocab_size}"
        facts.append((parts[field.name], value))
    return facts
