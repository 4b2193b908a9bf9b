"""LLaMA decoders under their Hugging Face names: the text tower, the middleware's base, the LLM."""

from collections.abc import Mapping
from typing import Any

from internvl_jax.convert.config_json import get, require
from internvl_jax.convert.mapping import Rule, Same, Transpose
from internvl_jax.models.config import LlamaConfig

IGNORE = (r".*\.rotary_emb\.inv_freq",)  # a buffer of older classes; the angles are computed


def config_from_json(config: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """LlamaConfig of a Hugging Face LLaMA configuration (also grouped-query attention)."""
    require(config, "hidden_act", ("silu",), where)
    require(config, "rope_scaling", (None,), where)
    require(config, "attention_bias", (False,), where)
    require(config, "pretraining_tp", (1,), where)
    heads = get(config, "num_attention_heads", where)
    return LlamaConfig(
        vocab_size=get(config, "vocab_size", where),
        width=get(config, "hidden_size", where),
        depth=get(config, "num_hidden_layers", where),
        num_heads=heads,
        mlp_dim=get(config, "intermediate_size", where),
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim"),
        eps=config.get("rms_norm_eps", 1e-6),
        rope_base=float(config.get("rope_theta", 10000.0)),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """The Hugging Face LLaMA configuration of a LlamaConfig."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }


def rules(config: LlamaConfig, torch: str, ours: str = "llama") -> tuple[Rule, ...]:
    """The stack without its language head. `torch` is the prefix before `embed_tokens`."""
    layers = tuple(range(config.depth))
    one, block = f"{torch}layers.{{i}}.", f"{ours}/blocks/"
    names = [("attn/q", "self_attn.q_proj"), ("attn/k", "self_attn.k_proj")]
    names += [("attn/v", "self_attn.v_proj"), ("attn/o", "self_attn.o_proj")]
    names += [(f"mlp/{name}", f"mlp.{name}_proj") for name in ("gate", "up", "down")]
    table = [Rule(f"{torch}embed_tokens.weight", f"{ours}/embed/embedding")]
    for path, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
        table.append(Rule(f"{one}{name}.weight", f"{block}{path}/scale", Same(), layers))
    for path, name in names:
        table.append(Rule(f"{one}{name}.weight", f"{block}{path}/kernel", Transpose(), layers))
    table.append(Rule(f"{torch}norm.weight", f"{ours}/norm/scale"))
    return tuple(table)


def head_rules(config: LlamaConfig, torch: str, ours: str = "llama") -> tuple[Rule, ...]:
    """The language head; `torch` is the prefix before `lm_head`. Tied embeddings have none."""
    if config.tie_embeddings:
        return ()
    return (Rule(f"{torch}lm_head.weight", f"{ours}/lm_head/kernel", Transpose()),)
