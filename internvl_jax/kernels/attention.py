"""The one attention function of the project, and the choice of what runs it."""

import jax

from internvl_jax.kernels import reference, xla
from internvl_jax.kernels.masks import Full, Mask

FULL = Full()
IMPLEMENTATIONS = {"xla": xla.attention, "reference": reference.attention}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask = FULL,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped queries and computed masks.

    Args:
        query: [B, T, H, D].
        key, value: [B, S, K, D], K dividing H.
        mask: what each query sees (`kernels.masks`); a row that sees nothing gives zeros.
        scale: multiplies the scores; 1/sqrt(D) by default.
        implementation: "xla" or "reference"; None chooses the fastest.

    Returns:
        [B, T, H, D] in the dtype of `value`; scores and softmax are float32.

    Raises:
        ValueError: unknown implementation, or head counts that do not divide.
    """
    name = "xla" if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {name!r}: choose from {list(IMPLEMENTATIONS)}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} query heads do not divide over {key.shape[2]} key heads"
        )
    return IMPLEMENTATIONS[name](query, key, value, mask=mask, scale=scale)
