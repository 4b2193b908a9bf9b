"""Products of two matrices inside a Pallas TPU kernel, in the three ways that attention needs."""

import jax
import jax.numpy as jnp

PLAIN = (((1,), (0,)), ((), ()))  # [S, T] · [T, D] → [S, D]
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # [S, D] · [T, D] → [S, T]
COLUMNS_BY_ROWS = (((0,), (0,)), ((), ()))  # [S, T] · [S, D] → [T, D]


def dot(a: jax.Array, b: jax.Array, dimensions: tuple) -> jax.Array:
    """The product in float32; of float32 operands exactly."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a, b, dimensions, preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    )  # fmt: skip
