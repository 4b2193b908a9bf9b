"""Loading and exporting whole checkpoints in the official PyTorch layouts.

A layout is a module with `HOLDS`, the kind of model it is for, `config_to_json`, `rules`, `ignore`
and `config_from_json(description, where, shapes)`; a further family is a further module and a line
in `LAYOUTS`. `shapes` are those of the checkpoint's tensors, for what its config.json leaves open.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax.convert import (
    chat,
    chat_llava,
    config_json,
    hf,
    internvit,
    internvl,
    language,
    legacy,
    llama,
    lora,
    model_card,
)
from internvl_jax.convert.config_json import ConfigError
from internvl_jax.convert.mapping import Leaf, Rule, Shape, TorchTensors, check, leaves
from internvl_jax.convert.safetensors_files import SHARD_BYTES, Tensors, new_directory, write
from internvl_jax.models import LoraConfig, ModelConfig, abstract, int8
from internvl_jax.models.config import ARCHITECTURES
from internvl_jax.rules import flatten, unflatten

LAYOUTS = {
    "internvl-14b": internvl,
    "internvit": internvit,
    "internvl-c-legacy": legacy,
    "chat": chat,
    "chat-llava": chat_llava,
    "hf": hf,
    "language": language,
}
ARCHITECTURE_NAMES = (
    "InternVLModel (InternVL-14B)",
    "InternVisionModel",
    "InternVLChatModel",
    "InternVLForConditionalGeneration",
    "LlavaLlamaForCausalLM (InternVL-Chat 1.0)",
    *llama.CLASSES.values(),
)


@dataclass(frozen=True)
class Opened:
    """An official checkpoint of which nothing but headers has been read.

    leaves: our parameters by path, each to be read whole or in part. ignored: keys without a place
    that need none, such as buffers of older classes.
    """

    layout: str
    config: ModelConfig
    leaves: dict[str, Leaf]
    ignored: tuple[str, ...]
    tensors: Tensors


def open_torch_layout(path: str | os.PathLike, dtype: Any = None) -> Opened:
    """Opens an official checkpoint, recognising its layout from config.json or its keys.

    Args:
        path: a directory with safetensors (and config.json), or one .safetensors file.
        dtype: of floating-point parameters; None keeps the checkpoint's own.

    Raises:
        FileError, ConfigError, MappingError: what does not hold together, all of it at once.
    """
    tensors = Tensors(path)
    directory = tensors.path if tensors.path.is_dir() else tensors.path.parent
    description = config_json.read(directory)
    layout = recognise(description, tensors, directory)
    torch_shapes = {key: spec.shape for key, spec in tensors.specs.items()}
    where = str(directory / "config.json") if description else str(tensors.path)
    config = LAYOUTS[layout].config_from_json(description, where, torch_shapes)
    adapted, base_layer = lora.found(config, tensors) if layout == "internvl-14b" else ((), True)
    table = _table(layout, config, adapted, base_layer)
    ranks = {path: lora.rank(table, path, tensors.specs) for path in adapted}
    shapes = _plain(parameter_shapes(config, ranks))
    check(table, torch_shapes, shapes, LAYOUTS[layout].ignore(config), what=str(tensors.path))
    # The configuration of fresh adapters knows one rank; differing ranks live in the arrays only.
    if len(set(ranks.values())) == 1:
        targets = "|".join(sorted(ranks))
        config = replace(config, lora=LoraConfig(rank=max(ranks.values()), targets=targets))
    used = {key for rule in table for key in rule.keys}
    return Opened(
        layout=layout,
        config=config,
        leaves=dict(leaves(table, tensors, tensors.specs, shapes, dtype)),
        ignored=tuple(key for key in tensors if key not in used),
        tensors=tensors,
    )


def load_torch_layout(
    path: str | os.PathLike, dtype: Any = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads an official checkpoint; arguments and errors are those of `open_torch_layout`.

    Returns:
        The configuration, and a nested dict of arrays: on the shardings of the current mesh, each
        device reading its own part only, or on the first device. Adapters stay adapters.
    """
    opened = open_torch_layout(path, dtype)
    ranks = {
        path.removesuffix("/lora_a"): leaf.shape[-1]
        for path, leaf in opened.leaves.items()
        if path.endswith("/lora_a")
    }
    shapes = parameter_shapes(replace(opened.config, lora=None), ranks)
    return opened.config, _placed(opened.leaves, shapes)


def read_params(
    tensors: Tensors,
    table: Iterable[Rule],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    ignore: Iterable[str] = (),
    dtype: Any = None,
) -> dict[str, Any]:
    """Reads the parameters in `shapes` (by path), which may be a part of a model.

    Raises:
        MappingError: missing, unexpected and mis-shaped keys, all together.
    """
    table = tuple(table)
    torch_shapes = {key: spec.shape for key, spec in tensors.specs.items()}
    check(table, torch_shapes, _plain(shapes), ignore, what=str(tensors.path))
    return _placed(dict(leaves(table, tensors, tensors.specs, _plain(shapes), dtype)), shapes)


def _placed(
    parameters: Mapping[str, Leaf], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Nested dict of arrays on the devices; one stacked parameter at a time is in host memory.

    Where `shapes` carries shardings (`parameter_shapes` under `jax.set_mesh`), each device asks
    only for its own part.
    """
    return unflatten({p: _place(leaf, shapes[p].sharding) for p, leaf in parameters.items()})


@dataclass(frozen=True)
class Export:
    """Parameters as they will stand in an official checkpoint; nothing is written yet.

    description: the content of config.json.
    """

    layout: str
    config: ModelConfig
    description: Mapping[str, Any]
    tensors: TorchTensors

    def write(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> list[str]:
        """Writes weights, config.json and model card; returns the names of the weight files."""
        files = write(directory, self.tensors.specs, self.tensors.read, shard_bytes)
        text = json.dumps(self.description, indent=2) + "\n"
        (directory / "config.json").write_text(text, "utf-8")
        specs = self.tensors.specs.values()
        card = model_card.text(self.config, self.layout, [(s.shape, str(s.dtype)) for s in specs])
        (directory / "README.md").write_text(card, "utf-8")
        return files


def plan_export(
    parameters: Mapping[str, Any], config: ModelConfig, layout: str, dtype: Any = None
) -> Export:
    """Decides how parameters will stand in a layout, without reading them.

    Args:
        parameters: {path: array, or anything that `TorchTensors` reads from}.
        config, layout, dtype: as of `export`, with its errors.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    if not isinstance(config, LAYOUTS[layout].HOLDS):
        fitting = [name for name, module in LAYOUTS.items() if isinstance(config, module.HOLDS)]
        what = f"a {type(config).__name__.removesuffix('Config')}"
        raise ConfigError(f"the layout {layout} cannot hold {what}; use {' or '.join(fitting)}")
    int8.refuse(parameters, "an export")
    config = replace(config, lora=None)
    adapters = {name: array for name, array in parameters.items() if name.endswith("/lora_a")}
    ranks = {name.removesuffix("/lora_a"): array.shape[-1] for name, array in adapters.items()}
    shapes = parameter_shapes(config, ranks)
    ours = {name: tuple(array.shape) for name, array in parameters.items()}
    check([Rule(name, name) for name in shapes], ours, _plain(shapes), what="the parameters")
    description = LAYOUTS[layout].config_to_json(config)
    if ranks:
        if layout != "internvl-14b":
            raise ConfigError(f"{layout} has no place for adapters; merge them first (lora.merged)")
        description |= lora.config_to_json(ranks)
    table = _table(layout, config, ranks)
    check(table, _torch_shapes(table, shapes), _plain(shapes), what=f"the layout {layout}")
    tensors = TorchTensors(table, parameters, dtype)
    widest = max((spec.dtype for spec in tensors.specs.values()), key=lambda d: d.itemsize)
    description["torch_dtype"] = str(widest)
    return Export(layout, config, description, tensors)


def export(
    params: Mapping[str, Any],
    config: ModelConfig,
    path: str | os.PathLike,
    layout: str = "internvl-14b",
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Writes parameters as an official checkpoint: safetensors, config.json and a model card.

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
    planned = plan_export(flatten(params), config, layout, dtype)
    with new_directory(path) as directory:
        return planned.write(directory, shard_bytes)


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
    kind = description.get("model_type")
    # Two programs call their models "internvl"; the parts of the configuration tell them apart.
    for layout, part, kinds in (
        ("internvl-14b", "qllama_config", ("internvl",)),
        ("chat", "llm_config", ("internvl_chat",)),
        ("chat-llava", "mm_projector_type", ("llava", "llama")),
        ("hf", "text_config", ("internvl",)),
        ("internvit", "hidden_size", ("intern_vit_6b",)),
        ("language", "vocab_size", ARCHITECTURES),
    ):
        if part in description and kind in (*kinds, None):
            return layout
    names = ", ".join(description.get("architectures") or ["an unnamed architecture"])
    raise ConfigError(
        f"{where} holds {names} (model_type {kind!r}); supported are "
        f"{', '.join(ARCHITECTURE_NAMES)} and the older InternVL-C layout"
    )


def _table(
    layout: str, config: ModelConfig, adapted: Collection[str] = (), base_layer: bool = True
) -> tuple[Rule, ...]:
    if adapted:
        return lora.rules(config, adapted, base_layer)
    return LAYOUTS[layout].rules(config)


def _torch_shapes(
    table: Iterable[Rule], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Shape]:
    present = [rule for rule in table if all(path in shapes for path in rule.paths)]
    return {key: spec.shape for key, spec in TorchTensors(present, shapes).specs.items()}


def _plain(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Shape]:
    return {path: tuple(shape.shape) for path, shape in shapes.items()}


def _place(leaf: Leaf, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf.read())
    sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.read)
