"""Low-rank adapters on any linear layer, chosen by a rule over parameter paths.

An adapted kernel has two small neighbours, `lora_a` (in, r) and `lora_b` (r, out), and acts as
kernel + 2 · lora_a · lora_b (alpha = 2r, the scale of InternVL's released LoRA fine-tuning). The
sum is formed when a model is bound to its parameters, so no layer knows about adapters; gradients
reach them through the sum, and freezing the kernels keeps gradients and moments to the adapters
alone.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.models.config import LoraConfig, ModelConfigError
from internvl_jax.rules import flatten, unflatten

SCALE = 2.0


def add(params: Mapping[str, Any], config: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """Insert adapters beside every targeted kernel: lora_a random, lora_b zero (no effect yet).

    Raises:
        ModelConfigError: the targets match no linear layer.
    """
    flat = flatten(params)
    layers = [p.removesuffix("/kernel") for p in flat if p.endswith("/kernel")]
    targets = [layer for layer in layers if re.fullmatch(config.targets, layer)]
    if not targets:
        raise ModelConfigError(f"LoRA targets {config.targets!r} match no linear layer")
    for layer, layer_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        kernel = flat[f"{layer}/kernel"]
        *stacked, inputs, outputs = kernel.shape
        shape = (*stacked, inputs, config.rank)
        flat[f"{layer}/lora_a"] = jax.random.normal(layer_key, shape, kernel.dtype) * inputs**-0.5
        flat[f"{layer}/lora_b"] = jnp.zeros((*stacked, config.rank, outputs), kernel.dtype)
    return unflatten(flat)


def merged(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fold adapters into their kernels; a tree without adapters comes back as it is."""
    flat = flatten(params)
    for path in [p for p in flat if p.endswith("/lora_a")]:
        layer = path.removesuffix("/lora_a")
        a, b = flat.pop(path), flat.pop(f"{layer}/lora_b")
        kernel = flat[f"{layer}/kernel"]
        out = None if jax.typeof(kernel).sharding.mesh.empty else jax.typeof(kernel).sharding.spec
        delta = jnp.einsum("...dr,...rf->...df", a, b, out_sharding=out)
        flat[f"{layer}/kernel"] = kernel + SCALE * delta.astype(kernel.dtype)
    return unflatten(flat)
