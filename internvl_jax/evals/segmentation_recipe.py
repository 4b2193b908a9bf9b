"""How segmentation heads are learnt: AdamW with rates by layer (paper Table 5)."""

from typing import NamedTuple

import jax
import numpy as np
import optax

from internvl_jax.rules import flatten, unflatten


class Recipe(NamedTuple):
    """How a head is learnt, see `Segmentation`."""

    rate: float
    steps: int
    warmup: int
    weight_decay: float
    layer_decay: float


def layer_scales(learnt: dict, depth: int, rate: float) -> dict:
    """Learning-rate factors rate^(depth + 1 − layer): embeddings are layer 0, block i is i + 1.

    What is no part of the tower counts as the last layer. Blocks are stacked, so their factors
    are arrays along the leading axis.
    """

    def scale(path, leaf):
        if not path.startswith("vit/"):
            return np.float32(1.0)
        if path.startswith("vit/blocks/"):
            each = rate ** (depth + 1 - np.arange(1, depth + 1, dtype=np.float32))
            return each.reshape(-1, *(1,) * (leaf.ndim - 1))
        return np.float32(rate ** (depth + 1))

    return unflatten({path: scale(path, leaf) for path, leaf in flatten(learnt).items()})


def optimizer(learnt: dict, depth: int, recipe: Recipe) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, a linear decay to zero, and factors by layer.

    Biases, norms and other vectors have no weight decay; the stacked blocks' vectors are matrices
    here, so their leading axis does not count.
    """
    rate, steps, warmup, weight_decay, layer_decay = recipe
    rising = optax.linear_schedule(1e-6 * rate, rate, max(warmup, 1))
    falling = optax.linear_schedule(rate * (1 - warmup / steps), 0.0, steps - warmup)
    schedule = optax.join_schedules([rising, falling], [warmup])

    def decays(path, leaf):
        return leaf.ndim - path.startswith("vit/blocks/") > 1

    mask = unflatten({path: decays(path, leaf) for path, leaf in flatten(learnt).items()})
    scales = layer_scales(learnt, depth, layer_decay)
    return optax.chain(
        optax.scale_by_adam(0.9, 0.999),
        optax.add_decayed_weights(weight_decay, mask),
        optax.stateless(lambda u, _: jax.tree.map(lambda x, s: x * s, u, scales)),
        optax.scale_by_learning_rate(schedule),
    )
