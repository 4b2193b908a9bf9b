"""A language model as published starts the text tower, the middleware and the chat decoder."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from internvl_jax import cli, models, rules, sharding
from internvl_jax.models.config import CHATS, INTERNVLS, LLAMAS
from internvl_jax.train import pretrained, state
from internvl_jax.train.checkpoint import CheckpointError

DEPTH, HEADS, GROUPS, VOCAB, WIDTH, HIDDEN = 3, 4, 2, 960, 32, 64
HEAD_DIM = WIDTH // HEADS
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TO_DECODER = (("llama/(.*)", r"llm/\1"),)  # as stage3_sft renames


def model(groups, biases=False):
    """(layers, ends): {our name: torch tensor, one per layer} and {our name: torch tensor}."""
    rng = np.random.default_rng(0)
    narrow = groups * HEAD_DIM
    shapes = {
        "attn/q/kernel": (WIDTH, WIDTH),  # [out, in]
        "attn/k/kernel": (narrow, WIDTH),
        "attn/v/kernel": (narrow, WIDTH),
        "attn/o/kernel": (WIDTH, WIDTH),
        "mlp/gate/kernel": (HIDDEN, WIDTH),
        "mlp/up/kernel": (HIDDEN, WIDTH),
        "mlp/down/kernel": (WIDTH, HIDDEN),
        "norm1/scale": (WIDTH,),
        "norm2/scale": (WIDTH,),
    }
    if biases:
        shapes |= {f"attn/{n}/bias": (WIDTH if n == "q" else narrow,) for n in "qkv"}
    ends = {
        "embed/embedding": (VOCAB, WIDTH),
        "norm/scale": (WIDTH,),
        "lm_head/kernel": (VOCAB, WIDTH),
    }
    layers = {
        name: [rng.standard_normal(shape, np.float32) for _ in range(DEPTH)]
        for name, shape in shapes.items()
    }
    return layers, {n: rng.standard_normal(shape, np.float32) for n, shape in ends.items()}


def as_ours(layers, ends):
    """{path: array} that the model is to have."""
    blocks = {
        f"llama/blocks/{name}": np.stack([a.T if "kernel" in name else a for a in one])
        for name, one in layers.items()
    }
    ends = {f"llama/{n}": a.T if "kernel" in n else a for n, a in ends.items()}
    return blocks | ends


HUGGING_FACE = {
    "norm1/scale": "input_layernorm.weight",
    "norm2/scale": "post_attention_layernorm.weight",
    **{f"attn/{n}/kernel": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"attn/{n}/bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"mlp/{n}/kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}
HUGGING_FACE_ENDS = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
}
INTERNLM2 = {
    "norm1/scale": "attention_norm.weight",
    "norm2/scale": "ffn_norm.weight",
    "attn/o/kernel": "attention.wo.weight",
    "mlp/gate/kernel": "feed_forward.w1.weight",
    "mlp/down/kernel": "feed_forward.w2.weight",
    "mlp/up/kernel": "feed_forward.w3.weight",
}
INTERNLM2_ENDS = {
    "embed/embedding": "model.tok_embeddings.weight",
    "norm/scale": "model.norm.weight",
    "lm_head/kernel": "output.weight",
}


def published(kind, layers, ends):
    """{key: tensor} under the names of the published class."""
    names, last = HUGGING_FACE, HUGGING_FACE_ENDS
    if kind == "internlm2":
        names, last = INTERNLM2, INTERNLM2_ENDS
    tensors = {last[name]: array for name, array in ends.items()}
    for i in range(DEPTH):
        for name in set(layers) & set(names):
            tensors[f"model.layers.{i}.{names[name]}"] = layers[name][i]
        if kind == "internlm2":  # each key/value head follows the queries that read it
            q, k, v = (layers[f"attn/{n}/kernel"][i] for n in "qkv")
            share = len(q) // GROUPS
            rows = []
            for g in range(GROUPS):
                here = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)
                rows += [q[g * share : (g + 1) * share], k[here], v[here]]
            tensors[f"model.layers.{i}.attention.wqkv.weight"] = np.concatenate(rows)
    return tensors


def converted(tmp_path, kind, tensors, groups):
    """The path of a published folder after `internvl-jax convert`."""
    classes = {"llama": "Llama", "qwen2": "Qwen2", "internlm2": "InternLM2"}
    source, target = tmp_path / kind, tmp_path / f"{kind}_ours"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    description = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
        "model_type": kind,
        "num_key_value_heads": groups,
        **FIELDS,
    }
    if kind == "internlm2":
        description["bias"] = False
    (source / "config.json").write_text(json.dumps(description))
    cli.main(["convert", str(source), str(target), "--layout=jax"])
    return target


def start(config, path, rename=()):
    """What a run of this model takes from the checkpoint."""
    mesh = sharding.make_mesh(replica=1, fsdp=-1, tensor=1)
    with jax.set_mesh(mesh):
        shapes = state.on_mesh(models.abstract(config), mesh)
        return pretrained.load_params([dict(path=str(path), rename=rename)], shapes)


def assert_taken(loaded, expected):
    found = rules.flatten(loaded.params)
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


TOWER = replace(LLAMAS["tiny"], num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM)
CONTRASTIVE = replace(INTERNVLS["tiny"], llama=TOWER, num_queries=0)
GENERATIVE = replace(INTERNVLS["tiny"], llama=TOWER)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(converted checkpoint, what it holds under our names)."""
    weights = model(HEADS)
    tensors = published("llama", *weights)
    # Some published files carry this buffer of an older class.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder = tmp_path_factory.mktemp("llama")
    return converted(folder, "llama", tensors, HEADS), as_ours(*weights)


def test_llama_starts_the_text_tower_of_stage_1(llama):
    path, expected = llama
    loaded = start(CONTRASTIVE, path)
    # A text tower writes nothing, so it has no head.
    assert_taken(loaded, {n: a for n, a in expected.items() if not n.startswith("llama/lm_head")})
    assert "vit/class_embedding" in loaded.fresh and not loaded.misfits
    assert not any(name.startswith("llama/") for name in loaded.fresh)


def test_llama_starts_the_middleware_with_fresh_queries(llama):
    path, expected = llama
    loaded = start(GENERATIVE, path)
    assert_taken(loaded, expected)
    assert {"queries", "vit/class_embedding"} <= set(loaded.fresh)
    assert any(name.startswith("cross/") for name in loaded.fresh)
    assert not any(name.startswith("llama/") for name in loaded.fresh)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "internlm2"])
def test_language_model_starts_the_chat_decoder(kind, tmp_path):
    groups = HEADS if kind == "llama" else GROUPS
    weights = model(groups, biases=kind == "qwen2")
    path = converted(tmp_path, kind, published(kind, *weights), groups)
    decoder = models.from_dict(pretrained.read_experiment(path)["model"]).llama
    assert (decoder.architecture, decoder.num_kv_heads, decoder.eps) == (kind, groups, 1e-5)
    loaded = start(replace(CHATS["tiny"], llm=decoder), path, TO_DECODER)
    expected = as_ours(*weights)
    assert_taken(loaded, {n.replace("llama/", "llm/", 1): a for n, a in expected.items()})
    assert not any(name.startswith("llm/") for name in loaded.fresh)


def test_another_vocabulary_is_refused(llama):
    path, expected = llama
    wider = replace(GENERATIVE, llama=replace(TOWER, vocab_size=1500))
    with pytest.raises(CheckpointError, match="a tower is stored with other shapes") as caught:
        start(wider, path)
    message = str(caught.value)
    assert "llama/embed/embedding: stored as (960, 32), the model has (1500, 32)" in message
    assert "llama/lm_head/kernel: stored as (32, 960), the model has (32, 1500)" in message
    # Said outright, both tables start at random and all else is taken.
    loaded = start(wider, path, ((r"llama/(embed|lm_head)/.*", "unused"),))
    tables = {"llama/embed/embedding", "llama/lm_head/kernel"}
    assert tables <= set(loaded.fresh)
    assert_taken(loaded, {name: array for name, array in expected.items() if name not in tables})


def test_another_number_of_key_value_heads_is_refused(llama):
    grouped = replace(TOWER, num_kv_heads=GROUPS)
    with pytest.raises(CheckpointError, match=r"attn/k/kernel: .*\n.*attn/v/kernel: "):
        start(replace(GENERATIVE, llama=grouped), llama[0])
