"""Regular-expression rules over parameter paths, the one language for all per-parameter choices.

Learning-rate groups, freezing, weight-decay exemptions and LoRA targets are all written as
regular expressions over "/"-joined paths such as `vit/blocks/attn/qkv/kernel`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class RuleError(ValueError):
    """Paths that no rule matches, or rules that match no path."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict → {"a/b/c": leaf}, in the order of the tree."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} → nested dict; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def match(
    paths: Iterable[str], rules: Sequence[tuple[str, Any]], what: str = "rule"
) -> dict[str, Any]:
    """Give each path the value of the first rule whose regex matches it whole.

    Raises:
        RuleError: lists the paths without a rule and the rules that matched nothing.
    """
    compiled = [(re.compile(regex), value) for regex, value in rules]
    values: dict[str, Any] = {}
    used: set[int] = set()
    missing: list[str] = []
    for path in paths:
        for index, (regex, value) in enumerate(compiled):
            if regex.fullmatch(path):
                values[path] = value
                used.add(index)
                break
        else:
            missing.append(path)
    idle = [rules[i][0] for i in range(len(rules)) if i not in used]
    problems = []
    if missing:
        shown = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        problems.append(f"{len(missing)} parameter(s) match no {what}: {shown}")
    if idle:
        problems.append(f"these {what}s match no parameter of their own: {', '.join(idle)}")
    if problems:
        raise RuleError("; ".join(problems))
    return values


def partition(
    params: Mapping[str, Any], trainable: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a parameter tree into (trainable, frozen) by one regex over whole paths.

    Raises:
        RuleError: the regex matches nothing.
    """
    regex = re.compile(trainable)
    flat = flatten(params)
    chosen = {path: leaf for path, leaf in flat.items() if regex.fullmatch(path)}
    if not chosen:
        tops = ", ".join(sorted({path.split("/")[0] for path in flat}))
        raise RuleError(f"trainable={trainable!r} matches no parameter; the tree holds {tops}")
    rest = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(chosen), unflatten(rest)


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join two disjoint parameter trees; the inverse of `partition`."""
    return unflatten(dict(sorted({**flatten(first), **flatten(second)}.items())))
