"""InternLM2: LLaMA with grouped queries under other names, query, key and value in one matrix."""

from internvl_jax.convert.mapping import GroupedQueries, Rule, Same, Transpose
from internvl_jax.models.config import LlamaConfig

HEAD = "output.weight"


def rules(config: LlamaConfig, torch: str, ours: str) -> tuple[Rule, ...]:
    """The stack without its language head. `torch` is the prefix before `tok_embeddings`."""
    layers = tuple(range(config.depth))
    one, block = f"{torch}layers.{{i}}.", f"{ours}/blocks/"
    fused = GroupedQueries(config.num_kv_heads, config.head_dim)
    kernels = tuple(f"{block}attn/{name}/kernel" for name in "qkv")
    table = [
        Rule(f"{torch}tok_embeddings.weight", f"{ours}/embed/embedding"),
        Rule(f"{one}attention.wqkv.weight", kernels, fused, layers),
        Rule(f"{one}attention.wo.weight", f"{block}attn/o/kernel", Transpose(), layers),
    ]
    for path, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        torch_name = f"{one}feed_forward.{name}.weight"
        table.append(Rule(torch_name, f"{block}mlp/{path}/kernel", Transpose(), layers))
    for path, name in (("norm1", "attention_norm"), ("norm2", "ffn_norm")):
        table.append(Rule(f"{one}{name}.weight", f"{block}{path}/scale", Same(), layers))
    table.append(Rule(f"{torch}norm.weight", f"{ours}/norm/scale"))
    return tuple(table)
