"""Attention behind one function, with masks as small values."""

from internvl_jax.kernels.attention import attention, plain
from internvl_jax.kernels.attention_qkv import attention_qkv
from internvl_jax.kernels.masks import (
    ITC,
    ITG,
    ITM,
    Causal,
    Full,
    Keys,
    Lengths,
    Mask,
    Middleware,
    Prefix,
    Segments,
    Separate,
)

__all__ = [
    "ITC",
    "ITG",
    "ITM",
    "Causal",
    "Full",
    "Keys",
    "Lengths",
    "Mask",
    "Middleware",
    "Prefix",
    "Segments",
    "Separate",
    "attention",
    "attention_qkv",
    "plain",
]
