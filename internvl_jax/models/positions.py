"""Bicubic resizing of position embeddings and patch kernels, exactly as torch does it.

`F.interpolate(mode="bicubic", align_corners=False)` uses the cubic-convolution kernel with
a = −0.75, clamps indices at the border and never antialiases; `jax.image.resize` uses a = −0.5 and
antialiases, so it cannot be used here. The interpolation is linear in its input: one small matrix
per axis.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Matrix [new, old] of torch's bicubic interpolation along one axis, float32."""
    a = np.float64(-0.75)
    matrix = np.zeros((new, old), np.float64)
    for row in range(new):
        center = (row + 0.5) * old / new - 0.5
        start = math.floor(center)
        for tap in range(-1, 3):
            x = abs(center - (start + tap))
            if x <= 1:
                weight = ((a + 2) * x - (a + 3)) * x * x + 1
            else:
                weight = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            matrix[row, min(max(start + tap, 0), old - 1)] += weight
    return matrix.astype(np.float32)


def resize_grid(grid: jax.Array, height: int, width: int) -> jax.Array:
    """Resize the two leading axes of [H, W, …] to (height, width), in float32."""
    rows = bicubic_matrix(grid.shape[0], height)
    columns = bicubic_matrix(grid.shape[1], width)
    resized = jnp.einsum("hH,wW,HW...->hw...", rows, columns, grid.astype(jnp.float32))
    return resized.astype(grid.dtype)


def resize_position_embedding(embedding: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resize [1 + G², D] to [1 + height·width, D]; the class-token row is copied untouched."""
    side = math.isqrt(embedding.shape[0] - 1)
    if side * side != embedding.shape[0] - 1:
        raise ValueError(
            f"position embedding has {embedding.shape[0]} rows; expected 1 + a square grid"
        )
    if grid == (side, side):
        return embedding
    patches = resize_grid(embedding[1:].reshape(side, side, -1), *grid)
    return jnp.concatenate([embedding[:1], patches.reshape(grid[0] * grid[1], -1)])
