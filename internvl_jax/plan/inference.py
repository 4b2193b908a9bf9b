"""From an experiment's model to one call of its inference: encode, prefill or decode."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import sharding
from internvl_jax.models import ChatConfig, InternVLConfig, VisionConfig, bind, init, int8
from internvl_jax.models import config as models
from internvl_jax.plan import experiment
from internvl_jax.rules import flatten, unflatten
from internvl_jax.train import flops
from internvl_jax.train import state as states

MODES = ("encode", "prefill", "decode")


class InferenceError(ValueError):
    """The model of a config has no such inference."""


def build(
    config: Any, devices: list[Any], mode: str, weights: str | None = None
) -> experiment.Experiment:
    """One call over a batch of `config.batch_size` examples; traces, compiles nothing.

    encode: features of images and texts, with the middleware where the model has it; of a vision
    tower its tokens. prefill: read a prompt of `config.data.text_length` tokens and its image, with
    room for as many more. decode: one more token per row with such a cache. Parameters are
    bfloat16, as `load(..., "bfloat16")` places them; with the weights "int8", as `load` has those.

    Raises:
        InferenceError: a vision tower only encodes, a chat or language model encodes nothing, and
            an InternVL-C does not write.
    """
    model_config = models.from_dict(config.model)
    _check(model_config, mode)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    sharding.check_divisible(model_config, mesh, config.batch_size)
    with jax.set_mesh(mesh):
        shapes = states.on_mesh(init.abstract(model_config), mesh)
        params = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), shapes)
        if weights == "int8":
            params = unflatten(int8.described(flatten(params)))
        call, arguments = _call(config, model_config, mesh, mode, params)
        plain = models.from_dict({**config.model, "remat": "none"})
        work = flops.count(_call(config, plain, mesh, mode, params)[0], params, *arguments)
    donated = (2,) if mode == "decode" else ()  # the cache is updated in place
    return experiment.Experiment(
        mesh=mesh,
        step=jax.jit(call, donate_argnums=donated),
        arguments=(params, *arguments),
        params_trained=0,
        params_frozen=sum(x.size for x in jax.tree.leaves(shapes)),
        model_flops=work,
        samples=config.batch_size,
        batch_size=config.batch_size,
    )


def _check(config: models.ModelConfig, mode: str) -> None:
    contrasts, sees = isinstance(config, InternVLConfig), isinstance(config, VisionConfig)
    if mode == "encode" and not contrasts and not sees:
        raise InferenceError("encode needs an InternVL; chat and language models only write")
    if mode != "encode" and sees:
        raise InferenceError(f"{mode} needs a model that writes, which a vision tower does not")
    if mode != "encode" and contrasts and not config.num_queries:
        raise InferenceError(f"{mode} needs the middleware, which an InternVL-C does not have")


def _call(config: Any, model_config: Any, mesh: Any, mode: str, params: Any) -> tuple[Any, tuple]:
    """(function of the parameters and further arguments, shapes of these arguments)."""
    rows, length, size = config.batch_size, config.data.text_length, config.data.image_size
    place = sharding.batch_sharding(mesh)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place)
    images = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8, sharding=place)
    model = functools.partial(bind, model_config)

    def encode(params: Any, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        feature = "g" if model_config.num_queries else "c"
        return model(params).encode_image(images, feature), model(params).encode_text(ids)

    def see(params: Any, images: jax.Array) -> jax.Array:
        return model(params).vision(images)

    def prefill(params: Any, images: jax.Array, ids: jax.Array) -> tuple[jax.Array, Any]:
        here = model(params)
        if isinstance(model_config, InternVLConfig):
            room = model_config.num_queries + 2 * length
            return here.prefill(here.vision(images), ids, room)
        if isinstance(model_config, ChatConfig):
            return here.prefill(ids, images[:, None], 2 * length)
        return here.prefill(ids, 2 * length)

    if isinstance(model_config, VisionConfig):
        return see, (images,)
    if mode == "encode":
        return encode, (images, ids)
    if mode == "prefill":
        return prefill, (images, ids)
    cache = states.on_mesh(jax.eval_shape(prefill, params, images, ids)[1], mesh)
    token = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)
    return (lambda params, token, cache: model(params).decode(token, cache)), (token, cache)
