"""Experiment configs: from `--config` and its overrides to a checked, locked ConfigDict.

A config is a Python file with `get_config(arg: str = "") -> ConfigDict`. It is named either by
its path (`configs/stage1_contrastive.py`) or, for those that ship with the package, by its bare
name (`stage1_contrastive`); what follows a colon is handed to `get_config` (`:tiny`). Every wrong
name, key or value ends in a ConfigError of one line that lists the nearest valid ones.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

PACKAGE = "internvl_jax.configs"


class ConfigError(ValueError):
    """A config that does not exist, or a key or value in it that cannot be right."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The phrase "nearest: a, b" for an unknown word, or all choices where none is near."""
    choices = sorted(set(choices))
    # The user may know a key by its last part (weight_decay), or a name by its first (stage1).
    parts = [c for c in choices if c.split(".")[-1] == word.split(".")[-1] or c.startswith(word)]
    found = list(dict.fromkeys([*parts, *difflib.get_close_matches(word, choices, 3, 0.5)]))[:3]
    return f"nearest: {', '.join(found)}" if found else f"valid: {', '.join(choices)}"


def load(name: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Build the config called `name`, apply overrides, check it and lock it.

    Args:
        name: path or bare name, with an optional ":argument".
        overrides: (dotted key, text) pairs, `("optimizer.warmup_steps", "100")`.

    Raises:
        ConfigError: an unknown config, argument, key or value.
    """
    base, _, argument = name.partition(":")
    config = load_module(base).get_config(argument)
    for key, text in overrides:
        override(config, key, text)
    check(config)
    return config.lock()


def names() -> list[str]:
    """Bare names of the configs that ship with the package."""
    files = Path(_package().__path__[0]).glob("*.py")
    return sorted(file.stem for file in files if file.stem not in ("__init__", "common"))


def override(config: ConfigDict, key: str, text: str) -> None:
    """Set one field from text, read by the type of the value it replaces.

    Besides the fields that the config lists, `model.` takes every field of the chosen model. A
    tuple takes a Python literal or comma-separated words; `init_from` takes checkpoint paths
    and keeps the renames of the entries whose paths it replaces.

    Raises:
        ConfigError: no such key, or text that does not read as the field's type.
    """
    *parents, last = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict):
        raise ConfigError(f"unknown config key {key!r}; {nearest(key, _keys(config))}")
    if last in node:
        old = node[last]
    elif parents == ["model"] and last in (fields := _model_fields(config.model)):
        old = fields[last]
    else:
        known = [*_keys(config), *(f"model.{field}" for field in _model_fields(config.model))]
        raise ConfigError(f"unknown config key {key!r}; {nearest(key, known)}")
    if isinstance(old, ConfigDict):
        inner = [k for k in _keys(config) if k.startswith(f"{key}.")]
        raise ConfigError(f"config key {key!r} is a group; set one of: {', '.join(inner)}")
    value = _read(key, text, old)
    if key == "init_from":
        value = _with_renames(value, old)
    with node.unlocked(), node.ignore_type():
        node[last] = value


def check(config: ConfigDict) -> None:
    """Check every name and range that can be checked before anything is built.

    Raises:
        ConfigError: names the field, the value and the nearest valid values.
    """
    from internvl_jax import objectives
    from internvl_jax.data import conversation, pictures, pipelines, sources, text
    from internvl_jax.evals import evaluator
    from internvl_jax.models import config as models

    _one_of("objective", config.objective, objectives.OBJECTIVES)
    options = dataclasses.fields(objectives.OBJECTIVES[config.objective])
    for name in config.objective_options:
        _one_of("objective_options", name, [option.name for option in options])
    try:
        objectives.OBJECTIVES[config.objective](**config.objective_options)
    except ValueError as error:
        raise ConfigError(f"config.objective_options: {error}") from error
    try:
        models.from_dict(config.model)
    except models.ModelConfigError as error:
        raise ConfigError(f"config.model: {error}") from error
    _one_of("data.task", config.data.task, pipelines.TASKS)
    _one_of("data.augment", config.data.augment, pipelines.AUGMENTATIONS)
    _one_of("data.template", config.data.template, conversation.TRAINABLE)
    for language in config.data.languages:
        _one_of("data.languages", language, text.LANGUAGES)
    for name in config.evals:
        _one_of("evals", name, evaluator.EVALUATORS)
    _one_of("data.decoder", config.data.decoder, pictures.DECODERS)
    for source, _ in config.data.sources:
        kind, colon, path = source.partition(":")
        if not (colon and path and kind in sources.FORMATS):
            known = (*sources.EMBEDDED, *(f"{name}:PATH" for name in sources.FORMATS))
            _one_of("data.sources", source.partition("/")[0], known)
    for field, least in dict(batch_size=1, chunks=1, held_towers=0, steps=1, log_every=1).items():
        if config[field] < least:
            raise ConfigError(f"config key {field!r} must be at least {least}, got {config[field]}")


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain dictionaries and lists, as JSON would give it back."""
    return json.loads(to_json(config))


def to_json(config: ConfigDict) -> str:
    """The resolved config as it is written to `config.json` and into checkpoints."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False)


def _package() -> ModuleType:
    """internvl_jax.configs, also from a checkout that was never installed."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    if importlib.util.find_spec(PACKAGE):
        return importlib.import_module(PACKAGE)
    folder = Path(__file__).resolve().parent.parent / "configs"
    return _execute(PACKAGE, folder / "__init__.py", [str(folder)])


def load_module(base: str) -> ModuleType:
    """The Python module of a config, by path or bare name. Raises ConfigError if there is none."""
    package = _package()
    if base.endswith(".py") or "/" in base:
        path = Path(base)
        if not path.is_file():
            hint = nearest(path.stem, names())
            raise ConfigError(f"config file {base!r} does not exist; of the shipped ones, {hint}")
        module = _execute(f"_config_{path.stem}", path)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{base!r} defines no get_config(arg), which every config must")
        return module
    if base not in names():
        raise ConfigError(f"unknown config {base!r}; {nearest(base, names())}")
    return importlib.import_module(f"{package.__name__}.{base}")


def _execute(name: str, path: Path, search: list[str] | None = None) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=search)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in config.items():
        inner = isinstance(value, ConfigDict)
        keys += _keys(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return keys


def _model_fields(model: ConfigDict) -> dict[str, Any]:
    """Every field of the chosen model and its parts, with the value of its first occurrence."""
    from internvl_jax.models import config as models

    fields: dict[str, Any] = {}
    parts: list[Any] = [models.from_dict(model)]
    for part in parts:
        values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        parts += [value for value in values.values() if dataclasses.is_dataclass(value)]
        fields = {k: v for k, v in values.items() if not dataclasses.is_dataclass(v)} | fields
    return fields


def _read(key: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(old, str):
            return text
        if isinstance(old, int):
            return int(text.replace("_", ""))
        if isinstance(old, float):
            return float(text)
        if isinstance(old, tuple | list):
            return _tuple(text)
        return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError) as error:
        raise ConfigError(f"config key {key!r} takes values like {old!r}, not {text!r}") from error


def _tuple(text: str) -> tuple[Any, ...]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = tuple(word.strip() for word in text.split(",") if word.strip())
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _with_renames(value: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    entries = []
    for index, item in enumerate(value):
        if isinstance(item, Mapping):
            entries.append(dict(item))
        else:
            kept = dict(old[index]) if index < len(old) else {}
            entries.append({**kept, "path": item})
    return tuple(entries)


def _one_of(field: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigError(f"config key {field!r} is {value!r}; {nearest(str(value), choices)}")
