"""Rotary positions: tables of cosines and sines, also for contexts longer than those trained on.

The rotate-half layout of LLaMA. Scaled variants follow `transformers`' definitions, whose
checkpoints name them; dynamic scaling looks at the length of each row, so that what else is in the
batch changes nothing.
"""

import math

import jax
import jax.numpy as jnp

from internvl_jax.models.config import RopeScaling

Tables = tuple[jax.Array, jax.Array]


def tables(
    positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> Tables:
    """Rotary tables cos, sin: float32 [B, T, head_dim] for int32 positions [B, T].

    Frequencies base^(−2j/head_dim), duplicated by concatenation.
    """
    exponents = -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim  # [D/2]
    if scaling is not None and scaling.kind == "dynamic":
        frequencies = _dynamic_base(positions, head_dim, base, scaling) ** exponents  # [B, 1, D/2]
    else:
        frequencies = _scaled(base**exponents, head_dim, base, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.kind == "yarn":
        factor = scaling.attention_factor
        factor = 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
        cos, sin = cos * factor, sin * factor
    return cos, sin


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """Apply rotary tables to heads: [B, T, H, D]."""
    cos, sin = (table[:, :, None, :].astype(x.dtype) for table in tables)
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


def _dynamic_base(
    positions: jax.Array, head_dim: int, base: float, scaling: RopeScaling
) -> jax.Array:
    """base · (s·n/n₀ − (s − 1))^(D/(D−2)) for rows of n > n₀ positions; [B, 1, 1]."""
    length = jnp.max(positions, axis=1)[:, None, None] + 1
    ratio = jnp.maximum(length / scaling.original_positions, 1.0)
    return base * (scaling.factor * ratio - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))


def _scaled(
    frequencies: jax.Array, head_dim: int, base: float, scaling: RopeScaling | None
) -> jax.Array:
    """Frequencies [D/2] under the kinds that do not depend on the text's length."""
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "llama3":
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return share * frequencies + (1 - share) * slow

    def index(rotations: float) -> float:
        """Which frequency makes so many rotations over the original context."""
        wavelength = scaling.original_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(base))

    low = max(math.floor(index(scaling.beta_fast)), 0)
    high = min(math.ceil(index(scaling.beta_slow)), head_dim - 1)
    ramp = (jnp.arange(head_dim // 2) - low) / max(high - low, 0.001)
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return ramp * slow + (1 - ramp) * frequencies
