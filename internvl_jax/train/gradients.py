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
activations. The last chunk of a tower that is held goes forward once for 1 and 3: its activations
wait for 2. What a frozen vision tower gives is the same in 1 and 3, so 1 keeps it. An example draws
its randomness from a key of its own, so 1 and 3 see the same masks, and the result does not depend
on the number of chunks.

Every device cuts its own rows into chunks, so no example changes its device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import rules
from internvl_jax.objectives import Objective, Outputs
from internvl_jax.sharding import batch_pieces, spec

Bind = Callable[[dict], Any]
Part = tuple[dict[str, jax.Array], jax.Array]
Names = tuple[str, ...]
# Chunks that go forward at once when no layer keeps anything for the way back. Of a token, the wide
# arrays of an InternViT-6B block hold 35,000 numbers; a backward pass keeps 48 layers' inputs,
# 154,000, and has its own wide arrays on top.
_AT_ONCE = 5


def forward_passes(chunks: int, rows: int) -> int:
    """Into how many equal parts the pass for the features cuts so many chunks of so many rows."""
    whole, most = chunks * rows, _AT_ONCE * rows
    return next(n for n in range(1, whole + 1) if whole % n == 0 and whole <= n * most)


def value_and_grad(
    objective: Objective,
    bind: Bind,
    trainable: dict,
    frozen: dict,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    chunks: int = 1,
    held_towers: int = 1,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict]:
    """((loss, metrics), gradient by `trainable`) of a whole batch.

    bind: parameters → model. keys: one per example. chunks: divides each device's examples.
    held_towers: how many of the groups in `objective.separate` (or all outputs together, where
      there are none) hold the activations of their last chunk until the loss is known. The first
      goes back first and holds what its next chunk will need again; a further one adds its own.
    """

    def model(trainable: dict) -> Any:
        return bind(rules.merge(trainable, frozen))

    if chunks > 1:
        return _in_chunks(objective, model, trainable, batch, keys, chunks, held_towers)

    def whole(trainable: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective(model(trainable), batch, keys)

    return jax.value_and_grad(whole, has_aux=True)(trainable)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a step computes of a part of its batch: (fields, keys)."""

    objective: Objective
    model: Bind
    trainable: dict

    def with_vision(self, part: Part) -> Part:
        """A part with what a frozen tower gives for it."""
        if "vit" in self.trainable:
            return part
        fields, keys = part
        vision = self.objective.vision(self.model(self.trainable), fields, keys)
        return part if vision is None else ({**fields, "vision": vision}, keys)

    def features(self, part: Part) -> Outputs:
        return self.objective.features(self.model(self.trainable), *part)

    def outputs(self, part: Part, names: Names = ()) -> tuple[Outputs, Callable]:
        """Outputs, of these names or all, and their gradients → the gradient by `trainable`."""

        def run(trainable: dict) -> Outputs:
            every = self.objective.outputs(self.model(trainable), *part)
            # What the others need is never computed.
            return {name: every[name] for name in names or every}

        return jax.vjp(run, self.trainable)


def _in_chunks(
    objective: Objective,
    model: Bind,
    trainable: dict,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    chunks: int,
    held_towers: int,
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict]:
    work = _Work(objective, model, trainable)
    batch = objective.prepare(batch)
    parts = _cut((batch, keys), chunks)
    shapes = jax.eval_shape(lambda: work.outputs(_chunk(parts, 0))[0])
    needed = jax.eval_shape(lambda: work.features(_chunk(parts, 0)))
    groups = objective.separate or (tuple(shapes),)
    # What is mined depends on all features, and the outputs on what is mined.
    held = groups[:held_towers] if needed and not objective.mines else ()
    ahead = chunks - bool(held)

    cached, vision = _features(work, jax.tree.map(lambda x: x[:, :ahead], parts))
    results: Outputs = {}
    pulls = []
    if held:
        # After the others: what it holds would be in memory beside their pass.
        last, cached = jax.lax.optimization_barrier((_chunk(parts, ahead), cached))
        last = work.with_vision(last)
        for names in held:
            own, pull = work.outputs(last, names)
            results |= own
            pulls.append((names, pull))
        known = results if needed.keys() <= results.keys() else work.features(last) | results
        cached = {name: _follow(x, known[name]) for name, x in cached.items()}
        vision = {name: _follow(x, last[0][name]) for name, x in vision.items()}
    batch = {**batch, **vision}
    if objective.mines:
        batch = objective.mine(cached, batch)
    parts = _cut((batch, keys), chunks)

    # Where the loss is linear in an output, its gradient is the same everywhere, so also at zero.
    at = {name: _zeros(x, chunks) for name, x in shapes.items()} | cached
    gradient = jax.grad(lambda at: objective.loss(model(trainable), at, batch)[0])(at)
    gradient = _cut(gradient, chunks)

    def given(names: Names, number: jax.Array | int) -> Outputs:
        return {name: _chunk(gradient[name], number) for name in names}

    def turn(names: Names, total: dict, number: jax.Array) -> tuple[dict, Outputs]:
        own, pull = work.outputs(_chunk(parts, number), names)
        return jax.tree.map(jnp.add, total, *pull(given(names, number))), own

    total = jax.tree.map(jnp.zeros_like, trainable)
    for names, pull in reversed(pulls):  # the first goes on with its other chunks
        total = jax.tree.map(jnp.add, total, *pull(given(names, ahead)))
    for names in groups:
        # One after the other, so that two do not hold their activations at a time.
        total, parts = jax.lax.optimization_barrier((total, parts))
        left = jnp.arange(ahead if names in held else chunks)
        total, own = jax.lax.scan(functools.partial(turn, names), total, left)
        own = _joined(own)
        results |= {n: _follow(x, results[n]) if n in results else x for n, x in own.items()}

    # What is left is the gradient of parameters that the loss uses itself (the temperature).
    def last_use(trainable: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        return objective.loss(model(trainable), results, batch)

    value, direct = jax.value_and_grad(last_use, has_aux=True)(trainable)
    return value, jax.tree.map(jnp.add, total, direct)


def _features(work: _Work, parts: Part) -> tuple[Outputs, dict]:
    """The features of all chunks in `parts`, and under "vision" what a frozen tower gave."""
    chunks, rows = jax.tree.leaves(parts)[0].shape[1:3]
    passes = forward_passes(chunks, rows)
    given = _cut_again(parts, passes)

    def run(_: None, number: jax.Array) -> tuple[None, tuple[Outputs, dict]]:
        part = _chunk(given, number)
        whole = work.with_vision(part)
        added = {name: whole[0][name] for name in whole[0].keys() - part[0].keys()}
        return None, (work.features(whole), added)

    return _joined(jax.lax.scan(run, None, jnp.arange(passes))[1])


def _cut(tree: Any, chunks: int) -> Any:
    """[B, …] → [devices, chunks, rows, …] of every leaf: a view of what each device holds."""
    pieces = batch_pieces()
    return jax.tree.map(lambda x: _by_device(x, pieces, chunks, *x.shape[1:]), tree)


def _cut_again(parts: Any, chunks: int) -> Any:
    """The same rows of each device in another number of chunks."""
    return jax.tree.map(lambda x: _by_device(x, x.shape[0], chunks, *x.shape[3:]), parts)


def _by_device(x: jax.Array, pieces: int, chunks: int, *rest: int) -> jax.Array:
    shape = (pieces, chunks, x.size // (pieces * chunks * math.prod(rest)), *rest)
    return jnp.reshape(x, shape, out_sharding=spec("batch", *(None,) * (len(shape) - 1)))


def _follow(early: jax.Array, late: jax.Array) -> jax.Array:
    """Each device's rows of `late` after those of `early`, [B, …] all three."""
    both = [x[:, 0] for x in _cut((early, late), 1)]
    joined = jnp.concatenate(both, axis=1)
    shape = (early.shape[0] + late.shape[0], *early.shape[1:])
    return jnp.reshape(joined, shape, out_sharding=spec("batch", *(None,) * (len(shape) - 1)))


def _chunk(parts: Any, number: jax.Array | int) -> Any:
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
