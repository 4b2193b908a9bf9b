"""Reading of config.json files: absent and unsupported entries are named, never guessed over."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A config.json that lacks something, or asks for what is not supported."""


def read(directory: Path) -> dict[str, Any] | None:
    """The config.json of a checkpoint directory, or None where there is none."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content


def get(config: Mapping[str, Any], name: str, where: str) -> Any:
    """`config[name]`; `where` says in the error which part of config.json this is."""
    try:
        return config[name]
    except KeyError:
        near = difflib.get_close_matches(name, config, n=3, cutoff=0.3)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise ConfigError(f"{where} has no {name!r}{hint}") from None


def require(config: Mapping[str, Any], name: str, supported: tuple, where: str) -> None:
    """Raises ConfigError unless the entry is absent or one of the supported values."""
    value = config.get(name, supported[0])
    if value not in supported:
        choices = " or ".join(repr(choice) for choice in supported)
        raise ConfigError(f"{where} has {name} = {value!r}; supported is {choices}")
