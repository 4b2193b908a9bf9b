"""Loss and gradient of one step, in one pass or in chunks whose memory is that of a chunk.

Chunks give the gradient of the whole batch, not a mean of smaller losses. Where a loss compares
the examples of a batch with one another (the contrastive ones), their features come first:

    1. forward over the examples, keeping only the features      (left out for the other losses)
    2. the gradient of the loss by the outputs of all examples
    3. forward and backward over the chunks with that gradient, adding up

(Gao et al. 2021, "Scaling deep contrastive learning batch size under memory limited setup".) 1
holds the activations of one layer where 3 holds something of every layer, so it takes several
chunks at once, and gathers sharded weights less often. In 3, towers that share no output take
turns, each through all chunks: the gradient of 2 is known, so neither needs the other's
activations. What a frozen vision tower gives is the same in 1 and 3, so 1 keeps it. An example
draws its randomness from a key of its own, so 1 and 3 see the same masks, and the result does not
depend on the number of chunks.

Every device cuts its own rows into chunks, so no example changes its device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import rules
from internvl_jax.objectives import Objective
from internvl_jax.sharding import batch_pieces, spec

Bind = Callable[[dict], Any]
# Chunks that go forward at once when no layer keeps anything for the way back. Of a token, the wide
# arrays of an InternViT-6B block hold 35,000 numbers; a backward pass keeps 48 layers' inputs,
# 154,000, and has its own wide arrays on top.
_AT_ONCE = 5


def forward_chunks(chunks: int) -> int:
    """Into how many parts the pass for the features cuts a step of so many chunks."""
    return next(n for n in range(1, chunks + 1) if chunks % n == 0 and chunks <= n * _AT_ONCE)


def value_and_grad(
    objective: Objective,
    bind: Bind,
    trainable: dict,
    frozen: dict,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    chunks: int = 1,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict]:
    """((loss, metrics), gradient by `trainable`) of a whole batch.

    bind: parameters → model. keys: one per example. chunks: divides each device's examples.
    """

    def model(trainable: dict) -> Any:
        return bind(rules.merge(trainable, frozen))

    if chunks > 1:
        return _in_chunks(objective, model, trainable, batch, keys, chunks)

    def whole(trainable: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective(model(trainable), batch, keys)

    return jax.value_and_grad(whole, has_aux=True)(trainable)


def _in_chunks(
    objective: Objective,
    model: Bind,
    trainable: dict,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    chunks: int,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict]:
    batch = objective.prepare(batch)
    fewer, numbers = forward_chunks(chunks), jnp.arange(chunks)
    given = _cut((batch, keys), fewer)
    tower_learns = "vit" in trainable

    def features(_: None, number: jax.Array) -> tuple[None, tuple[dict, dict]]:
        whole, (part, part_keys) = model(trainable), _chunk(given, number)
        vision = None if tower_learns else objective.vision(whole, part, part_keys)
        kept = {} if vision is None else {"vision": vision}
        return None, (objective.features(whole, {**part, **kept}, part_keys), kept)

    cached, kept = _joined(jax.lax.scan(features, None, numbers[:fewer])[1])
    batch = {**batch, **kept}
    if objective.mines:
        batch = objective.mine(cached, batch)
    parts = _cut((batch, keys), chunks)

    def outputs(trainable: dict, number: jax.Array) -> dict:
        return objective.outputs(model(trainable), *_chunk(parts, number))

    # Where the loss is linear in an output, its gradient is the same everywhere, so also at zero.
    shapes = jax.eval_shape(outputs, trainable, numbers[0])
    at = {name: _zeros(x, chunks) for name, x in shapes.items()} | cached
    gradient = jax.grad(lambda at: objective.loss(model(trainable), at, batch)[0])(at)
    gradient = _cut(gradient, chunks)

    def backward(names: tuple[str, ...], total: dict, number: jax.Array) -> tuple[dict, dict]:
        def chosen(trainable: dict) -> dict:
            every = outputs(trainable, number)  # what the others need is never computed
            return {name: every[name] for name in names}

        results, pull = jax.vjp(chosen, trainable)
        (part,) = pull({name: _chunk(gradient[name], number) for name in names})
        return jax.tree.map(jnp.add, total, part), results

    total, results = jax.tree.map(jnp.zeros_like, trainable), {}
    for names in objective.separate or (tuple(shapes),):
        turn = functools.partial(backward, names)
        total, own = jax.lax.scan(turn, total, numbers)
        results |= _joined(own)

    # What is left is the gradient of parameters that the loss uses itself (the temperature).
    def last(trainable: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective.loss(model(trainable), results, batch)

    value, direct = jax.value_and_grad(last, has_aux=True)(trainable)
    return value, jax.tree.map(jnp.add, total, direct)


def _cut(tree: Any, chunks: int) -> Any:
    """[B, …] → [devices, chunks, rows, …] of every leaf: a view of what each device holds."""
    pieces = batch_pieces()

    def cut(x: jax.Array) -> jax.Array:
        shape = (pieces, chunks, x.shape[0] // (pieces * chunks), *x.shape[1:])
        return jnp.reshape(x, shape, out_sharding=spec("batch", *(None,) * (len(shape) - 1)))

    return jax.tree.map(cut, tree)


def _chunk(parts: Any, number: jax.Array) -> Any:
    """One chunk of `_cut`'s result, [B / chunks, …]."""

    def take(x: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
        shape = (x.shape[0] * x.shape[1], *x.shape[2:])
        return jnp.reshape(x, shape, out_sharding=spec("batch", *(None,) * (len(shape) - 1)))

    return jax.tree.map(take, parts)


def _joined(results: Any) -> Any:
    """What a scan over the chunks stacked, [chunks, B / chunks, …], in the order of the batch."""
    pieces = batch_pieces()

    def join(x: jax.Array) -> jax.Array:
        rest = x.shape[2:]
        shape = (x.shape[0], pieces, x.shape[1] // pieces, *rest)
        nones = (None,) * len(rest)
        x = jnp.reshape(x, shape, out_sharding=spec(None, "batch", None, *nones))
        x = jnp.swapaxes(x, 0, 1)
        shape = (shape[0] * shape[1] * shape[2], *rest)
        return jnp.reshape(x, shape, out_sharding=spec("batch", *nones))

    return jax.tree.map(join, results)


def _zeros(chunk: Any, chunks: int) -> jax.Array:
    """Zeros for the outputs of a whole batch, of which `chunk` describes a part."""
    shape = (chunk.shape[0] * chunks, *chunk.shape[1:])
    return jnp.zeros(shape, chunk.dtype, out_sharding=spec("batch", *(None,) * (len(shape) - 1)))
