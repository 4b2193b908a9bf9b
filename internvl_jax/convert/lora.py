"""Low-rank adapters in InternVL-14B checkpoints, under the names that peft gives them.

peft puts `base_model.model.` behind the prefix of a tower that has adapters, and from version 0.7
on a `base_layer` level into the key of each adapted linear layer. The adapters' scale is
alpha / rank = 2 in all released code.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from internvl_jax.convert import internvl
from internvl_jax.convert.config_json import ConfigError
from internvl_jax.convert.mapping import Rule, Transpose
from internvl_jax.convert.safetensors_files import Spec
from internvl_jax.models.config import InternVLConfig

A, B = ".lora_A.default.weight", ".lora_B.default.weight"


def rules(
    config: InternVLConfig, adapted: Collection[str], base_layer: bool = True
) -> tuple[Rule, ...]:
    """The InternVL-14B table with adapters on the linear layers at the paths `adapted`.

    base_layer: whether keys of adapted layers have the level of peft 0.7 and later.
    """
    return tuple(_adapted(_base(config, adapted), adapted, base_layer))


def _base(config: InternVLConfig, adapted: Collection[str]) -> tuple[Rule, ...]:
    def wrapped(prefix: str, path: str) -> str:
        adapters = any(name.startswith(path) for name in adapted)
        return f"{prefix}base_model.model." if adapters else prefix

    return internvl.rules(config, wrapped("vision_model.", "vit/"), wrapped("qllama.", "llama/"))


def _adapted(table: Iterable[Rule], adapted: Collection[str], base_layer: bool) -> Iterator[Rule]:
    for rule in table:
        path, _, leaf = rule.ours.rpartition("/")
        if path not in adapted or leaf not in ("kernel", "bias"):
            yield rule
            continue
        stem, _, kind = rule.torch.rpartition(".")
        yield replace(rule, torch=f"{stem}.base_layer.{kind}") if base_layer else rule
        if leaf == "kernel":
            yield Rule(stem + A, f"{path}/lora_a", Transpose(), rule.layers)
            yield Rule(stem + B, f"{path}/lora_b", Transpose(), rule.layers)


def found(config: InternVLConfig, keys: Collection[str]) -> tuple[set[str], bool]:
    """Paths of the linear layers with adapters, and whether the keys have a base_layer level."""
    towers = {"vit/"} if any(key.startswith("vision_model.base_model.") for key in keys) else set()
    towers |= {"llama/"} if any(key.startswith("qllama.base_model.") for key in keys) else set()
    adapted = set()
    for rule in _base(config, towers):
        path, _, leaf = rule.ours.rpartition("/")
        stem = rule.keys[0].rpartition(".")[0]
        if leaf == "kernel" and stem + A in keys:
            adapted.add(path)
    return adapted, any(".base_layer." in key for key in keys)


def rank(table: Iterable[Rule], path: str, specs: Mapping[str, Spec]) -> int:
    """Rank of the adapter at one path, from the shape of its first layer."""
    (key,) = (rule.keys[0] for rule in table if rule.ours == f"{path}/lora_a")
    return specs[key].shape[0]


def config_to_json(ranks: Mapping[str, int]) -> dict[str, int]:
    """The entries of config.json that make the official class wrap its towers.

    Raises ConfigError where one tower has adapters of different ranks, which it cannot say.
    """
    entries = {}
    for name, tower in (("use_backbone_lora", "vit/"), ("use_qllama_lora", "llama/")):
        found = {rank for path, rank in ranks.items() if path.startswith(tower)}
        if len(found) > 1:
            raise ConfigError(f"{name} is one rank, but the adapters of {tower} have {found}")
        entries[name] = max(found, default=0)
    return entries
