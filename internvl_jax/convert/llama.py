"""LLaMA decoders under their Hugging Face names: LLaMA, Qwen2, Qwen3; InternLM2 has its own.

The text tower, the middleware's base and the language model of the chat models all come from here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from internvl_jax.convert import internlm2
from internvl_jax.convert.config_json import ConfigError, get, require
from internvl_jax.convert.mapping import Rule, Same, Transpose
from internvl_jax.models.config import ARCHITECTURES, LlamaConfig, RopeScaling

IGNORE = (r".*\.rotary_emb\.inv_freq",)  # a buffer of older classes; the angles are computed
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
}
_SCALING_FIELDS = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}


def config_from_json(
    config: Mapping[str, Any], where: str = "config.json", default: str = "llama"
) -> LlamaConfig:
    """LlamaConfig of a language model's config.json.

    default: the architecture of a configuration without model_type.
    """
    kind = config.get("model_type", default)
    if kind not in ARCHITECTURES:
        names = ", ".join(config.get("architectures") or [])
        raise ConfigError(
            f"{where} has model_type {kind!r}{names and f' ({names})'}; supported language models "
            f"are {', '.join(ARCHITECTURES)}"
        )
    require(config, "hidden_act", ("silu",), where)
    require(config, "pretraining_tp", (1,), where)
    require(config, "use_sliding_window", (False,), where)
    require(config, "mlp_bias", (False, None), where)
    if kind == "internlm2":
        require(config, "bias", (False,), where)
    biased = kind != "internlm2" and bool(config.get("attention_bias", False))
    heads = get(config, "num_attention_heads", where)
    positions = config.get("max_position_embeddings", 2048)
    base, scaling = _rope(config, positions, where)
    stop = config.get("eos_token_id", 2)
    return LlamaConfig(
        vocab_size=get(config, "vocab_size", where),
        width=get(config, "hidden_size", where),
        depth=get(config, "num_hidden_layers", where),
        num_heads=heads,
        mlp_dim=get(config, "intermediate_size", where),
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else None),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        qkv_bias=kind == "qwen2" or biased,
        o_bias=kind != "qwen2" and biased,
        qk_norm=kind == "qwen3",
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        architecture=kind,
        max_positions=positions,
        bos_id=config.get("bos_token_id", 1),
        eos_ids=tuple(stop) if isinstance(stop, list | tuple) else () if stop is None else (stop,),
        pad_id=config.get("pad_token_id"),
    )


def _rope(
    config: Mapping[str, Any], positions: int, where: str
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, in the older or the newer form of config.json."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    entry = config.get(name) or {}
    base = float(entry.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = entry.get("rope_type", entry.get("type", "default"))
    require(entry, "partial_rotary_factor", (1.0,), f"{name} of {where}")
    if kind == "default":
        return base, None
    if kind not in _SCALING_FIELDS:
        known = ", ".join(("default", *_SCALING_FIELDS))
        raise ConfigError(f"{name} of {where} has the type {kind!r}; supported are {known}")
    given = {field: entry[field] for field in _SCALING_FIELDS[kind] if field in entry}
    original = entry.get("original_max_position_embeddings", positions)
    factor = float(get(entry, "factor", f"{name} of {where}"))
    return base, RopeScaling(kind, factor, original, **given)


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """The language model's config.json.

    Raises ConfigError for a combination that the architecture does not have.
    """
    kind = config.architecture
    allowed = {
        "llama": not config.qk_norm and config.qkv_bias == config.o_bias,
        "qwen2": config.qkv_bias and not config.o_bias and not config.qk_norm,
        "qwen3": config.qk_norm and config.qkv_bias == config.o_bias,
        "internlm2": not (config.qk_norm or config.qkv_bias or config.o_bias),
    }
    if not allowed[kind]:
        raise ConfigError(
            f"{CLASSES[kind]} has no place for qkv_bias={config.qkv_bias}, o_bias={config.o_bias}, "
            f"qk_norm={config.qk_norm}; choose another architecture of the language model"
        )
    stop: Any = list(config.eos_ids)
    entries: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_base,
        "rope_scaling": _scaling_to_json(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": stop if len(stop) > 1 else stop[0] if stop else None,
        "pad_token_id": config.pad_id,
        "use_cache": True,
    }
    if kind == "internlm2":
        return entries | {"bias": False}
    if kind in ("llama", "qwen3"):
        entries |= {"attention_bias": config.qkv_bias, "head_dim": config.head_dim}
    if kind in ("qwen2", "qwen3"):
        entries["use_sliding_window"] = False
    return entries


def _scaling_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    # Both names of the type: programs before and after the change of 2024 read one of them.
    entry = {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor}
    entry |= {field: getattr(scaling, field) for field in _SCALING_FIELDS[scaling.kind]}
    if scaling.kind in ("llama3", "yarn"):
        entry["original_max_position_embeddings"] = scaling.original_positions
    return {name: value for name, value in entry.items() if value is not None}


def rules(config: LlamaConfig, torch: str, ours: str = "llama") -> tuple[Rule, ...]:
    """The stack without its language head. `torch` is the prefix before `embed_tokens`."""
    if config.architecture == "internlm2":
        return internlm2.rules(config, torch, ours)
    layers = tuple(range(config.depth))
    one, block = f"{torch}layers.{{i}}.", f"{ours}/blocks/"
    table = [Rule(f"{torch}embed_tokens.weight", f"{ours}/embed/embedding")]
    for path, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
        table.append(Rule(f"{one}{name}.weight", f"{block}{path}/scale", Same(), layers))
    for name in "qkvo":
        linear, path = f"{one}self_attn.{name}_proj", f"{block}attn/{name}"
        table.append(Rule(f"{linear}.weight", f"{path}/kernel", Transpose(), layers))
        if config.o_bias if name == "o" else config.qkv_bias:
            table.append(Rule(f"{linear}.bias", f"{path}/bias", Same(), layers))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            torch_name = f"{one}self_attn.{name}.weight"
            table.append(Rule(torch_name, f"{block}attn/{name}/scale", Same(), layers))
    for name in ("gate", "up", "down"):
        torch_name = f"{one}mlp.{name}_proj.weight"
        table.append(Rule(torch_name, f"{block}mlp/{name}/kernel", Transpose(), layers))
    table.append(Rule(f"{torch}norm.weight", f"{ours}/norm/scale"))
    return tuple(table)


def head_rules(config: LlamaConfig, torch: str, ours: str = "llama") -> tuple[Rule, ...]:
    """The language head; `torch` is the prefix before `lm_head`. Tied embeddings have none."""
    if config.tie_embeddings:
        return ()
    name = internlm2.HEAD if config.architecture == "internlm2" else "lm_head.weight"
    return (Rule(f"{torch}{name}", f"{ours}/lm_head/kernel", Transpose()),)


def with_head_of(config: LlamaConfig, keys: Mapping[str, Any], torch: str) -> LlamaConfig:
    """The configuration, its head tied to the embeddings or not as the checkpoint's keys show.

    The entry of config.json is no guide: the released programs override it in both directions.
    `torch` is the prefix before `lm_head`.
    """
    name = internlm2.HEAD if config.architecture == "internlm2" else "lm_head.weight"
    if config.tie_embeddings and f"{torch}{name}" in keys:
        return replace(config, tie_embeddings=False)
    return config
