"""Segmentation heads on the states of a vision tower: a linear layer, UperNet, and its FCN aid.

Paper Table 5 and the released mmsegmentation configs. Functions on dicts of arrays; `state` holds
the running statistics of the batch norms. Feature maps are [B, H, W, C].
"""

from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax.evals.heads import batch_norm, init_batch_norm, init_linear, layer_norm

POOLS = (1, 2, 3, 6)
_EPS = 1e-5
Tree = dict[str, Any]


def resize(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bilinear, without aligned corners: [B, H, W, C] → [B, *shape, C]."""
    return jax.image.resize(x, (x.shape[0], *shape, x.shape[-1]), "bilinear", antialias=False)


def _init_conv(key: jax.Array, inputs: int, outputs: int, side: int) -> tuple[Tree, Tree]:
    """Convolution without bias, batch norm and ReLU: weights and statistics."""
    std = (2 / (side * side * outputs)) ** 0.5
    norm, state = init_batch_norm(outputs)
    return {"kernel": std * jax.random.normal(key, (side, side, inputs, outputs)), **norm}, state


def _conv(weights: Tree, state: Tree, x: jax.Array, train: bool) -> tuple[jax.Array, Tree]:
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, weights["kernel"], (1, 1), "SAME", dimension_numbers=dimensions
    )
    y, state = batch_norm(weights, state, y, train, _EPS)
    return jax.nn.relu(y), state


def _init_up(key: jax.Array, width: int) -> Tree:
    std = width**-0.5
    return {"kernel": std * jax.random.normal(key, (width, 2, 2, width)), "bias": jnp.zeros(width)}


def _up(weights: Tree, x: jax.Array) -> jax.Array:
    """Transposed convolution 2 × 2 with stride 2."""
    batch, rows, columns, _ = x.shape
    y = jnp.einsum("bhwc,cijd->bhiwjd", x, weights["kernel"])
    return y.reshape(batch, 2 * rows, 2 * columns, -1) + weights["bias"]


def pooled(x: jax.Array, size: int) -> jax.Array:
    """Adaptive average pooling to size × size: cell i covers rows ⌊i·n/s⌋ to ⌈(i+1)·n/s⌉."""

    def weights(length):
        cells = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        place = jnp.arange(length)
        return jnp.stack([((place >= a) & (place < b)) / (b - a) for a, b in cells])

    rows, columns = weights(x.shape[1]), weights(x.shape[2])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def init_linear_head(key: jax.Array, width: int, classes: int) -> tuple[Tree, Tree]:
    """Batch norm and a 1 × 1 convolution on one state."""
    norm, state = init_batch_norm(width)
    return {"norm": norm, "classify": init_linear(key, width, classes)}, {"norm": state}


def linear_head(
    weights: Tree, state: Tree, maps: list[jax.Array], train: bool, key: jax.Array | None = None
) -> tuple[jax.Array, None, Tree]:
    """Logits [B, H, W, classes] of the only map, and the new statistics."""
    x, norm = batch_norm(weights["norm"], state["norm"], maps[0], train, _EPS)
    return _classify(weights["classify"], x), None, {"norm": norm}


def init_upernet(
    key: jax.Array, width: int, channels: int, classes: int
) -> tuple[Tree, Tree]:
    """UperNet (arXiv 1807.10221) with a pyramid of four maps made from four states."""
    keys = iter(jax.random.split(key, 32))
    shapes = {f"pool{size}": (width, channels, 1) for size in POOLS}
    shapes["pyramid"] = (width + len(POOLS) * channels, channels, 3)
    shapes |= {f"lateral{i}": (width, channels, 1) for i in range(3)}
    shapes |= {f"smooth{i}": (channels, channels, 3) for i in range(3)}
    shapes |= {"fuse": (4 * channels, channels, 3), "aid": (width, channels, 3)}
    weights, state = {}, {}
    for name, shape in shapes.items():
        weights[name], state[name] = _init_conv(next(keys), *shape)
    weights |= {f"up{i}": _init_up(next(keys), width) for i in range(3)}
    weights["up_norm"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    weights["classify"] = init_linear(next(keys), channels, classes)
    weights["classify_aid"] = init_linear(next(keys), channels, classes)
    return weights, state


def upernet(
    weights: Tree,
    state: Tree,
    maps: list[jax.Array],
    train: bool,
    key: jax.Array | None = None,
    aid: int = 1,
    rate: float = 0.1,
) -> tuple[jax.Array, jax.Array, Tree]:
    """Logits at four times the grid of the four maps, the auxiliary head's, and new statistics.

    key: for dropout of `rate` before the classifiers; None: none. aid: the map of the FCN head.
    """
    new = dict(state)

    def conv(name, x):
        y, new[name] = _conv(weights[name], state[name], x, train)
        return y

    first = _up(weights["up0"], maps[0])
    first = _up(weights["up1"], jax.nn.gelu(layer_norm(weights["up_norm"], first, 1e-6), False))
    shrunk = jax.lax.reduce_window(
        maps[3], -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    pyramid = [first, _up(weights["up2"], maps[1]), maps[2], shrunk]
    top = pyramid[3]
    pools = [
        resize(conv(f"pool{size}", pooled(top, size)), top.shape[1:3]) for size in POOLS
    ]
    levels = [conv(f"lateral{i}", pyramid[i]) for i in range(3)]
    levels.append(conv("pyramid", jnp.concatenate([top, *pools], axis=-1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[1:3])
    shape = levels[0].shape[1:3]
    outputs = [conv(f"smooth{i}", levels[i]) for i in range(3)] + [levels[3]]
    fused = conv("fuse", jnp.concatenate([resize(x, shape) for x in outputs], axis=-1))
    helped = conv("aid", pyramid[aid])
    if train and key is not None:
        first_key, second_key = jax.random.split(key)
        fused, helped = _drop(first_key, fused, rate), _drop(second_key, helped, rate)
    main = _classify(weights["classify"], fused)
    return main, _classify(weights["classify_aid"], helped), new


def _classify(weights: Tree, x: jax.Array) -> jax.Array:
    return x @ weights["kernel"] + weights["bias"]


def _drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Drop whole channels of each image, as mmsegmentation's Dropout2d."""
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0], 1, 1, x.shape[-1]))
    return x * kept / (1 - rate)
