"""From an experiment to what is compiled: the real train step on a mesh of compile-only devices."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import objectives, rules, sharding
from internvl_jax.data.packing import row_squares
from internvl_jax.models import config as models
from internvl_jax.models import init
from internvl_jax.train import flops, optimizer
from internvl_jax.train import state as states
from internvl_jax.train.step import make_train_step

# Names and trailing shapes of a batch's text arrays, per task (`data.pipelines`).
_TEXTS = {
    "language": ("tokens",),
    "contrastive": ("text",),
    "generative": ("positive", "negative", "text", "caption", "caption_labels"),
    "retrieval": ("positive", "negative", "text"),
    "instruct": ("tokens", "labels"),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a plan needs of one experiment.

    step, arguments: the compiled function of training and the shapes, with shardings, it takes.
    params_trained, params_frozen: numbers of parameters.
    model_flops: of one step over all devices, without rematerialisation.
    """

    mesh: jax.sharding.Mesh
    step: Callable[..., Any]
    arguments: tuple[Any, ...]
    params_trained: int
    params_frozen: int
    model_flops: float
    samples: int  # of the whole recipe
    batch_size: int


def build(config: Any, devices: list[Any]) -> Experiment:
    """The train step of a config for these devices; traces, compiles nothing.

    Raises:
        MeshError: the config's mesh does not fit the devices, or a dimension does not divide.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    model_config = models.from_dict(config.model)
    sharding.check_divisible(model_config, mesh, config.batch_size, config.chunks)
    with jax.set_mesh(mesh):
        shapes = states.on_mesh(init.abstract(model_config), mesh)
        learned, frozen = rules.partition(shapes, config.trainable)
        inner = getattr(model_config, "middleware", None) or model_config
        tx, learning_rate = optimizer.make_optimizer(
            config.optimizer,
            learned,
            steps=config.steps,
            all_params=shapes,
            cross_every=getattr(inner, "cross_every", 1),
        )
        make_state = functools.partial(states.create, trainable=config.trainable, tx=tx)
        state = states.on_mesh(jax.eval_shape(make_state, shapes), mesh)
        step = make_train_step(
            objectives.OBJECTIVES[config.objective](**config.objective_options),
            functools.partial(init.bind, model_config),
            tx,
            seed=config.seed,
            chunks=config.chunks,
            held_towers=config.held_towers,
            learning_rate=learning_rate,
        )
        batch = batch_shapes(config, mesh)
        work = flops.of_step(config, state, batch)
    return Experiment(
        mesh=mesh,
        step=step,
        arguments=(state, batch),
        params_trained=sum(x.size for x in jax.tree.leaves(learned)),
        params_frozen=sum(x.size for x in jax.tree.leaves(frozen)),
        model_flops=work,
        samples=config.steps * config.batch_size,
        batch_size=config.batch_size,
    )


def batch_shapes(config: Any, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `config.data`, sharded as `train.loop.to_devices` places them."""
    task, size, rows = config.data.task, config.data.image_size, config.batch_size
    place = sharding.batch_sharding(mesh)

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    batch = {name: array(config.data.text_length) for name in _TEXTS[task]}
    if task == "instruct":
        data = config.data
        if data.packing:
            batch["segments"] = array(data.text_length)
        squares = row_squares(data.max_tiles, data.packing, data.packed_squares)
        batch["image"] = array(squares, size, size, 3, dtype=jnp.uint8)
    elif task != "language":
        batch["image"] = array(size, size, 3, dtype=jnp.uint8)
    if task in ("generative", "retrieval"):
        batch["image_id"] = array()
    return batch


def bytes_per_device(tree: Any) -> float:
    """Bytes of one device's part of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
