"""Loading and exporting whole checkpoints in the official PyTorch layouts.

A layout is a module with `config_from_json`, `config_to_json`, `rules` and `ignore`; a further
family is a further module and a line in `LAYOUTS`.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.convert import config_json, internvit, internvl, legacy, lora
from internvl_jax.convert.config_json import ConfigError
from internvl_jax.convert.mapping import Leaf, Rule, Shape, TorchTensors, check, leaves
from internvl_jax.convert.safetensors_files import SHARD_BYTES, Tensors, new_directory, write
from internvl_jax.models import LoraConfig, ModelConfig, abstract
from internvl_jax.rules import flatten, unflatten

LAYOUTS = {"internvl-14b": internvl, "internvit": internvit, "internvl-c-legacy": legacy}
MODEL_TYPES = {"internvl": "internvl-14b", "intern_vit_6b": "internvit"}


def load_torch_layout(
    path: str | os.PathLike, dtype: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads an official checkpoint, recognising its layout from config.json or its keys.

    Args:
        path: a directory with safetensors (and config.json), or one .safetensors file.
        dtype: of floating-point parameters; None keeps the checkpoint's own.

    Returns:
        The configuration, and the parameters as `read_params` gives them. Adapters stay adapters.

    Raises:
        FileError, ConfigError, MappingError: what does not hold together, all of it at once.
    """
    tensors = Tensors(path)
    directory = tensors.path if tensors.path.is_dir() else tensors.path.parent
    description = config_json.read(directory)
    layout = recognise(description, tensors, directory)
    config = _read_config(layout, description, tensors, directory)
    adapted, base_layer = lora.found(config, tensors) if layout == "internvl-14b" else ((), True)
    table = _table(layout, config, adapted, base_layer)
    ranks = {path: lora.rank(table, path, tensors.specs) for path in adapted}
    ignore = LAYOUTS[layout].ignore(config)
    params = read_params(tensors, table, parameter_shapes(config, ranks), ignore, dtype)
    # The configuration of fresh adapters knows one rank; differing ranks live in the arrays only.
    if len(set(ranks.values())) == 1:
        targets = "|".join(sorted(ranks))
        config = replace(config, lora=LoraConfig(rank=max(ranks.values()), targets=targets))
    return config, params


def export(
    params: Mapping[str, Any],
    config: ModelConfig,
    path: str | os.PathLike,
    layout: str = "internvl-14b",
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes parameters as an official checkpoint: safetensors and config.json.

    Args:
        params: nested dict of arrays; adapters, if any, are written un-merged under peft's names.
        path: a directory that does not exist yet (or is empty); it appears complete or not at all.
        layout: one of `LAYOUTS`.
        dtype: of floating-point tensors; None keeps each parameter's own.
        shard_bytes: more than this many bytes become several files and an index.

    Returns:
        The names of the weight files.

    Raises:
        ConfigError: unknown layout, or a model that it cannot hold.
        MappingError: parameters that do not fit the configuration or have no place in the layout.
        FileExistsError: `path` already holds something.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    flat = flatten(params)
    config = replace(config, lora=None)
    adapters = {name: array for name, array in flat.items() if name.endswith("/lora_a")}
    ranks = {name.removesuffix("/lora_a"): array.shape[-1] for name, array in adapters.items()}
    shapes = parameter_shapes(config, ranks)
    ours = {name: tuple(array.shape) for name, array in flat.items()}
    check([Rule(name, name) for name in shapes], ours, _plain(shapes), what="the parameters")
    description = LAYOUTS[layout].config_to_json(config)
    if ranks:
        if layout != "internvl-14b":
            raise ConfigError(f"{layout} has no place for adapters; merge them first (lora.merged)")
        description |= lora.config_to_json(ranks)
    table = _table(layout, config, ranks)
    check(table, _torch_shapes(table, shapes), _plain(shapes), what=f"the layout {layout}")
    tensors = TorchTensors(table, flat, dtype)
    widest = max((spec.dtype for spec in tensors.specs.values()), key=lambda d: d.itemsize)
    description["torch_dtype"] = str(widest)
    with new_directory(path) as directory:
        files = write(directory, tensors.specs, tensors.read, shard_bytes)
        text = json.dumps(description, indent=2) + "\n"
        (directory / "config.json").write_text(text, "utf-8")
    return files


def read_params(
    tensors: Tensors,
    table: Iterable[Rule],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    ignore: Iterable[str] = (),
    dtype: Any = None,
) -> dict[str, Any]:
    """Reads every parameter in `shapes` (by path) from torch tensors; a nested dict of arrays.

    One of our stacked parameters at a time is in host memory; where `shapes` carries shardings
    (`parameter_shapes` under `jax.set_mesh`), each device asks only for its own part.

    Raises:
        MappingError: missing, unexpected and mis-shaped keys, all together.
    """
    table = tuple(table)
    torch_shapes = {key: spec.shape for key, spec in tensors.specs.items()}
    check(table, torch_shapes, _plain(shapes), ignore, what=str(tensors.path))
    params = {
        path: _place(leaf, shapes[path].sharding)
        for path, leaf in leaves(table, tensors, tensors.specs, _plain(shapes), dtype)
    }
    return unflatten(params)


def parameter_shapes(
    config: ModelConfig, ranks: Mapping[str, int] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape} of a model, with adapters of rank `ranks[path]` on these linear layers."""
    shapes = flatten(abstract(config))
    for path, rank in (ranks or {}).items():
        kernel = shapes[f"{path}/kernel"]
        *stacked, inputs, outputs = kernel.shape
        mesh = kernel.sharding and kernel.sharding.mesh
        sharding = mesh and NamedSharding(mesh, PartitionSpec())  # adapters are small: everywhere
        for name, shape in (("lora_a", (inputs, rank)), ("lora_b", (rank, outputs))):
            shapes[f"{path}/{name}"] = jax.ShapeDtypeStruct(
                (*stacked, *shape), kernel.dtype, sharding=sharding
            )
    return shapes


def recognise(
    description: Mapping[str, Any] | None, keys: Collection[str], where: str | os.PathLike
) -> str:
    """Name of the layout of a checkpoint with this config.json (or None) and these keys."""
    if "pos_embed" in keys and "cls_token" in keys:
        return "internvl-c-legacy"
    if description is None:
        raise ConfigError(f"{where} has no config.json, and its keys are of no known layout")
    model_type = description.get("model_type")
    if model_type not in MODEL_TYPES:
        names = ", ".join(description.get("architectures") or ["an unnamed architecture"])
        raise ConfigError(
            f"{where} holds {names} (model_type {model_type!r}); supported are the model types "
            f"{', '.join(MODEL_TYPES)} and the older InternVL-C layout"
        )
    return MODEL_TYPES[model_type]


def _read_config(
    layout: str, description: Mapping[str, Any] | None, tensors: Tensors, directory: Path
) -> ModelConfig:
    if layout == "internvl-c-legacy" and "model" not in (description or {}):
        shapes = {key: spec.shape for key, spec in tensors.specs.items()}
        return legacy.config_from_shapes(shapes, str(tensors.path))
    return LAYOUTS[layout].config_from_json(description, str(directory / "config.json"))


def _table(
    layout: str, config: ModelConfig, adapted: Collection[str] = (), base_layer: bool = True
) -> tuple[Rule, ...]:
    if adapted:
        return lora.rules(config, adapted, base_layer)
    return LAYOUTS[layout].rules(config)


def _torch_shapes(
    table: Iterable[Rule], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Shape]:
    present = [rule for rule in table if rule.ours in shapes]
    return {key: r.torch_shape(shapes[r.ours].shape) for r in present for key in r.keys}


def _plain(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Shape]:
    return {path: tuple(shape.shape) for path, shape in shapes.items()}


def _place(leaf: Leaf, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf.read())
    sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.read)
