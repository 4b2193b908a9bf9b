"""QLLaMA and its relatives: cross-attention at any frequency, caches, adapters, image tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import models
from internvl_jax.kernels import Causal, Full, Keys
from internvl_jax.models import lora
from internvl_jax.models.chat import IMAGE_TOKEN, pixel_shuffle
from internvl_jax.models.config import LLAMAS, ModelConfigError, replace
from internvl_jax.models.llama import Llama
from internvl_jax.rules import flatten, partition

PIXELS = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
IDS = np.array([[1, 5, 9, 30, 7, 2, 0, 0], [1, 8, 8, 40, 41, 42, 43, 2]], np.int32)


def build(**fields):
    config = models.from_dict(dict(family="internvl", size="tiny") | fields)
    return config, models.create(config, jax.random.key(0))


def test_llama_with_all_variants_matches_a_step_by_step_cache():
    config = replace(
        LLAMAS["tiny"], num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True
    )
    llama = Llama(config, jax.random.key(1))
    hidden = llama(llama.embed_tokens(IDS), mask=Causal() & Keys(IDS > 0))
    whole = np.asarray(llama.logits(hidden))
    _, keys, values, _ = llama.run(llama.embed_tokens(IDS[:, :3]), mask=Causal(), cache=True)
    from internvl_jax.models.llama import make_cache

    cache = make_cache(keys, values, jnp.ones((2, 3), bool), 8)
    for position in range(3, 6):
        logits, cache = llama.decode(jnp.asarray(IDS[:, position]), cache)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-5)


@pytest.mark.parametrize("cross_every", [1, 2, 3, 4])
def test_groups_equal_a_plain_loop_over_layers(cross_every):
    """Depth 3 with every frequency: full groups, a remainder, and a group longer than the depth."""
    config, params = build(cross_every=cross_every)
    model = models.bind(config, params)
    vision = model.vision(PIXELS)
    got = model.query_outputs(vision)

    llama, x = model.llama, model.query_embeddings(2)
    tables = llama.tables(jnp.arange(config.num_queries)[None])
    for layer in range(config.llama.depth):
        block = jax.tree.map(lambda a, i=layer: a[i], llama.blocks)
        x, _, _ = block.self_attention(x, Full(), tables)
        if layer % cross_every == 0:
            cross = jax.tree.map(lambda a, i=layer // cross_every: a[i], model.cross)
            x = x + cross(x, vision)
        x = block.feed_forward(x)
    np.testing.assert_allclose(got, llama.norm(x), atol=1e-5)


def test_caption_cache_continues_the_whole_sequence():
    config, params = build()
    model = models.bind(config, params)
    vision = model.vision(PIXELS)
    first, cache = model.prefill(vision, jnp.asarray(IDS[:, :4]), 12)
    second, _ = model.decode(jnp.asarray(IDS[:, 4]), cache)
    longer, _ = model.prefill(vision, jnp.asarray(IDS[:, :5]), 12)
    np.testing.assert_allclose(second, longer, atol=1e-5)
    assert np.abs(np.asarray(first) - np.asarray(longer)).max() > 1e-3
    with pytest.raises(ValueError, match="cannot extend"):
        model.prefill(vision, jnp.asarray(IDS), 8)


def test_prompt_padding_on_either_side_changes_nothing():
    config, params = build()
    model = models.bind(config, params)
    vision = model.vision(PIXELS[:1])
    ids = IDS[:1, :4]
    plain, _ = model.prefill(vision, jnp.asarray(ids), 16)
    for padding in [((0, 0), (3, 0)), ((0, 0), (0, 3))]:
        padded, cache = model.prefill(vision, jnp.asarray(np.pad(ids, padding)), 16)
        np.testing.assert_allclose(padded, plain, atol=1e-5)
        assert cache.positions[0] == config.num_queries + 4


def test_text_features_do_not_depend_on_padding():
    config, params = build(num_queries=0)
    model = models.bind(config, params)
    np.testing.assert_allclose(
        model.encode_text(IDS[:1]), model.encode_text(IDS[:1, :6]), atol=1e-6
    )
    with pytest.raises(ValueError, match="needs queries"):
        model.encode_image(PIXELS, "g")


def test_adapters_start_without_effect_and_merge_exactly():
    plain, params = build()
    config = models.from_dict(
        dict(family="internvl", size="tiny", lora=dict(rank=2, targets=r"llama/.*/attn/[qkvo]"))
    )
    adapted = models.create(config, jax.random.key(0))
    names = [p for p in flatten(adapted) if "lora" in p]
    assert sorted(names) == sorted(
        f"llama/blocks/attn/{n}/lora_{s}" for n in "qkvo" for s in "ab"
    )
    base = {p: v for p, v in flatten(adapted).items() if "lora" not in p}
    from internvl_jax.rules import unflatten

    before = models.bind(config, adapted).encode_text(IDS)
    np.testing.assert_allclose(before, models.bind(plain, unflatten(base)).encode_text(IDS))
    rng = np.random.default_rng(0)
    flat = flatten(adapted)
    flat["llama/blocks/attn/q/lora_b"] = jnp.asarray(rng.normal(size=(3, 2, 32)), jnp.float32)
    merged = flatten(lora.merged(unflatten(flat)))
    expected = flat["llama/blocks/attn/q/kernel"] + 2.0 * np.einsum(
        "lir,lro->lio", flat["llama/blocks/attn/q/lora_a"], flat["llama/blocks/attn/q/lora_b"]
    )
    np.testing.assert_allclose(merged["llama/blocks/attn/q/kernel"], expected, atol=1e-6)
    after = models.bind(config, unflatten(flat)).encode_text(IDS)
    assert np.abs(np.asarray(after - before)).max() > 1e-3
    trainable, frozen = partition(adapted, r".*/lora_[ab]")
    assert set(flatten(trainable)) == set(names) and len(flatten(frozen)) == len(base)
    with pytest.raises(ModelConfigError, match="match no linear layer"):
        lora.add(params, models.LoraConfig(2, "nothing"), jax.random.key(0))


def test_pixel_shuffle_orders_channels_by_row_then_column():
    grid = np.arange(16).reshape(4, 4)
    x = jnp.asarray(grid.reshape(1, 16, 1))
    shuffled = np.asarray(pixel_shuffle(x, 2, "v2"))
    np.testing.assert_array_equal(shuffled[0, 1], [2, 3, 6, 7])
    np.testing.assert_array_equal(np.asarray(pixel_shuffle(x, 2, "v1"))[0, 2], [2, 3, 6, 7])


@pytest.mark.parametrize("projector", ["mlp", "pixel_shuffle", "two_mlp"])
def test_chat_answers_depend_on_their_own_image_only(projector):
    fields = dict(family="chat", size="tiny", projector=projector)
    if projector == "two_mlp":
        fields["middleware"] = "tiny"
    config = models.from_dict(fields)
    model = models.bind(config, models.create(config, jax.random.key(0)))
    image_part = np.full((2, config.tokens_per_image), IMAGE_TOKEN, np.int32)
    tokens = np.concatenate([IDS[:, :1], image_part, IDS[:, 1:]], axis=1)
    logits = np.asarray(model(tokens, PIXELS[:, None]))
    swapped = np.asarray(model(tokens, np.stack([PIXELS[0], PIXELS[0]])[:, None]))
    np.testing.assert_allclose(swapped[0], logits[0], atol=1e-5)
    last = config.tokens_per_image + 4
    assert np.abs(swapped[1, last] - logits[1, last]).max() > 1e-4
    first, cache = model.prefill(tokens[:, : last + 1], PIXELS[:, None], last + 4)
    np.testing.assert_allclose(first, logits[:, last], atol=1e-5)
    second, _ = model.decode(jnp.asarray(tokens[:, last + 1]), cache)
    np.testing.assert_allclose(second[1], logits[1, last + 1], atol=1e-5)


def test_features_fill_image_positions_in_order():
    config = models.from_dict(dict(family="chat", size="tiny"))
    model = models.bind(config, models.create(config, jax.random.key(0)))
    count = config.tokens_per_image
    tokens = np.full((1, 2 * count + 2), IMAGE_TOKEN, np.int32)
    tokens[0, 0], tokens[0, count + 1] = 1, 5
    embedded = model.embed(tokens, PIXELS[None])
    features = model.image_features(PIXELS)
    np.testing.assert_allclose(embedded[0, 1 : count + 1], features[0], atol=1e-5)
    np.testing.assert_allclose(embedded[0, count + 2 :], features[1], atol=1e-5)
