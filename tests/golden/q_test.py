"""Q: QLLaMA alone against the official one: text, queries with cross-attention, cached steps."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvl_jax.convert import internvl, llama, read_params
from internvl_jax.kernels import Causal, Full, Keys, Prefix
from internvl_jax.kernels.reference import probabilities
from internvl_jax.models import qllama
from internvl_jax.models.attention import CrossAttention
from internvl_jax.models.layers import stack
from internvl_jax.models.llama import Llama, default_positions, make_cache, mask_positions
from internvl_jax.rules import flatten
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("Q"))
def test_middleware(case):
    compare = cases.Comparison(case)
    model = load(case)
    if "query_embeds" not in {name[3:] for name in case.tensors}:
        text(case, model, compare)
    elif "middleware" in compare:
        queries_and_text(case, model, compare)
    else:
        unpadded(case, model, compare)
    compare.done()


def load(case):
    """The LLaMA and its cross-attention layers as modules, with the case's numbers."""
    weights = case.weights()
    config = llama.config_from_json(case.config)
    every = case.config["cross_attention_frequency"]
    crossing = range(0, config.depth, every)
    vision_width = weights.specs["model.layers.0.cross_attn.k_proj.weight"].shape[1]
    key = jax.random.key(0)
    trunk = jax.eval_shape(lambda: Llama(config, key))
    cross = jax.eval_shape(
        lambda: stack(lambda k: CrossAttention(config, vision_width, k), len(crossing), key)
    )
    states = {"llama": nnx.state(trunk), "cross": nnx.state(cross)}
    shapes = flatten({name: nnx.to_pure_dict(state) for name, state in states.items()})
    params = read_params(weights, internvl.qllama_rules(config, every, ""), shapes)
    return SimpleNamespace(
        llama=nnx.merge(nnx.graphdef(trunk), params["llama"]),
        cross=nnx.merge(nnx.graphdef(cross), params["cross"]),
        every=every,
    )


def text(case, model, compare):
    """Text alone under every padding, with default and with mask-derived positions."""

    @jax.jit
    def run(trunk, ids, valid):
        mask = Causal() & Keys(valid)
        x = trunk.embed_tokens(ids)
        hidden, keys, values, states = trunk.run(x, mask=mask, states=True, cache=True)
        first = jax.tree.map(lambda a: a[0], trunk.blocks)
        query, key, _ = first.attn.project(first.norm1(x), trunk.tables(default_positions(x)))
        attention = probabilities(query, key, mask=mask)
        shifted = trunk(x, mask=mask, positions=mask_positions(valid))
        logits = trunk.logits(hidden), trunk.logits(shifted)
        return logits, keys[0], values[0], states, attention

    for name in [name for name in case.tensors if name.startswith("in.ids_")]:
        padding = name.removeprefix("in.ids_")
        valid = case.inputs(f"mask_{padding}") > 0
        ids = case.inputs(f"ids_{padding}")
        (logits, shifted), keys, values, states, attention = run(model.llama, ids, valid)
        compare.close(f"logits_{padding}", logits, valid)
        compare.close(f"logits_cumpos_{padding}", shifted, valid)
        for layer, state in enumerate(states):
            compare.close(f"hidden_{layer}_{padding}", state, valid)
        rows = np.broadcast_to(valid[:, None], attention.shape[:3])
        compare.close(f"attn0_{padding}", attention, rows)
        if valid.all():
            compare.close("key_cache_0", keys.transpose(0, 2, 1, 3))
            compare.close("value_cache_0", values.transpose(0, 2, 1, 3))


def compiled(model, queries):
    """QLLaMA as one function, compiled once for each kind of mask."""
    run = functools.partial(
        qllama.run, queries=queries, cross_every=model.every, states=True, cache=True
    )
    jitted = jax.jit(
        lambda trunk, cross, x, vision, mask: run(trunk, cross, x, vision, mask=mask)
    )
    return functools.partial(jitted, model.llama, model.cross)


def embed(case, model, ids):
    """[queries | text] embeddings."""
    text = model.llama.embed_tokens(ids)
    queries = case.inputs("query_embeds")
    repeated = np.broadcast_to(queries, (ids.shape[0], *queries.shape[1:]))
    return jnp.concatenate([repeated, text], axis=1)


def queries_and_text(case, model, compare):
    vision, ids = case.inputs("vision"), case.inputs("ids")
    x = embed(case, model, ids)
    queries = case.inputs("query_embeds").shape[1]
    run = compiled(model, queries)
    hidden, _, _, states = run(x[:, :queries], vision, Full())
    compare.close("middleware", hidden)
    for layer, state in enumerate(states):
        compare.close(f"middleware_hidden_{layer}", state)

    paddings = {"full": np.ones_like(ids), "right": case.inputs("mask")}
    paddings["left"] = case.inputs("mask_left")
    for padding, text_mask in paddings.items():
        valid = np.concatenate([np.ones((ids.shape[0], queries), bool), text_mask > 0], axis=1)
        for name, visible in (("zero", Prefix(queries)), ("causal", Causal())):
            mask = visible & Keys(jnp.asarray(valid))
            hidden, keys, values, states = run(x, vision, mask)
            label = f"{padding}_{name}"
            compare.close(f"logits_{label}", model.llama.logits(hidden), valid)
            if f"hidden_0_{label}" in compare:
                for layer, state in enumerate(states):
                    compare.close(f"hidden_{layer}_{label}", state, valid)
            if label == "full_zero":
                cache = make_cache(keys, values, jnp.asarray(valid), valid.shape[1] + 1)
                logits, _ = model.llama.decode(case.inputs("next_ids")[:, 0], cache)
                compare.close("step_logits", logits[:, None])

    # The official rows repeat the whole batch; ours keep the rows of an image together.
    repeat = compare.case.tensors["out.repeat3"].shape[0] // ids.shape[0]
    together = jnp.repeat(x, repeat, axis=0)
    hidden = run(together, vision, Full())[0]
    stacked = hidden.reshape(ids.shape[0], repeat, *hidden.shape[1:]).swapaxes(0, 1)
    compare.close("repeat3", stacked.reshape(hidden.shape))


def unpadded(case, model, compare):
    queries = case.inputs("query_embeds").shape[1]
    x = embed(case, model, case.inputs("ids"))
    hidden = compiled(model, queries)(x, case.inputs("vision"), Prefix(queries))[0]
    compare.close("last", hidden)
    compare.close("logits", model.llama.logits(hidden))
