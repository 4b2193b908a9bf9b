"""From a configuration to parameters, and from parameters to a model: the only use of NNX's API.

Parameters are a plain nested dict of arrays. `create` makes them already sharded over the current
mesh, `abstract` describes them without memory, `bind` turns a dict back into the module whose
methods compute with it. `bind` is pure and cheap: call it inside `jax.jit`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax.models import lora
from internvl_jax.models.chat import Chat, LanguageModel
from internvl_jax.models.config import (
    ChatConfig,
    InternVLConfig,
    LanguageModelConfig,
    ModelConfig,
    VisionConfig,
)
from internvl_jax.models.internvl import InternVL
from internvl_jax.models.vit import VisionModel

MODELS: dict[type, type] = {
    InternVLConfig: InternVL,
    ChatConfig: Chat,
    LanguageModelConfig: LanguageModel,
    VisionConfig: VisionModel,
}


@functools.partial(jax.jit, static_argnums=0)
def _build(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    base, adapters = jax.random.split(key)
    model = MODELS[type(config)](config, base)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params if config.lora is None else lora.add(params, config.lora, adapters)


def create(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters as a nested dict, born sharded over the current mesh."""
    return _build(config, key)


def abstract(config: ModelConfig) -> dict[str, Any]:
    """The tree of `create` as ShapeDtypeStructs (with shardings when a mesh is set)."""
    # The key is traced too: the mesh may be one of devices that only a compiler knows.
    return jax.eval_shape(lambda: _build(config, jax.random.key(0)))


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The tree of `create` as NamedShardings over a mesh."""
    with jax.set_mesh(mesh):
        described = abstract(config)
    return jax.tree.map(
        lambda a: NamedSharding(mesh, a.sharding.spec if a.sharding is not None else P()),
        described,
    )


@functools.lru_cache(maxsize=64)
def _definition(config: ModelConfig) -> Any:
    model = jax.eval_shape(lambda: MODELS[type(config)](config, jax.random.key(0)))
    return nnx.split(model)[0]


def bind(config: ModelConfig, params: Mapping[str, Any]) -> Any:
    """The model (InternVL, Chat or LanguageModel) that computes with `params`."""
    return nnx.merge(_definition(config), lora.merged(params))
