"""The optimizer against AdamW written out in numpy, and its per-parameter rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from internvl_jax import rules
from internvl_jax.train import optimizer

DEPTH = 3
SHAPES = {
    "vit/patch_embed/kernel": (12, 4),
    "vit/position_embedding": (5, 4),
    "vit/blocks/attn/qkv/kernel": (DEPTH, 4, 12),
    "vit/blocks/norm1/scale": (DEPTH, 4),
    "llama/embed/embedding": (7, 4),
    "llama/blocks/mlp/gate/kernel": (5, 4, 8),
    "llama/norm/scale": (4,),
    "cross/q/kernel": (3, 4, 4),
    "cross/norm1/scale": (3, 4),
    "queries": (2, 4),
    "pool/proj/kernel": (4, 6),
    "logit_scale": (),
}
CONFIG = dict(
    learning_rate=(("vit/.*|pool/.*", 1e-2), (".*", 3e-3)),
    schedule="cosine",
    warmup_steps=2,
    b1=0.9,
    b2=0.95,
    eps=1e-6,
    weight_decay=0.1,
    no_decay=".*embedding",
    clip_norm=0.7,
    layer_decay=(("vit", 0.8), ("llama", 0.9)),
    final_fraction=0.1,
)
# What the rules above mean for each parameter, worked out by hand: exponent of the layer decay
# (a vector for stacked parameters) and whether weight decay applies.
EXPECTED = {
    "vit/patch_embed/kernel": (1e-2, 0.8, 4, True),
    "vit/position_embedding": (1e-2, 0.8, 4, False),
    "vit/blocks/attn/qkv/kernel": (1e-2, 0.8, [3, 2, 1], True),
    "vit/blocks/norm1/scale": (1e-2, 0.8, [3, 2, 1], False),
    "llama/embed/embedding": (3e-3, 0.9, 6, False),
    "llama/blocks/mlp/gate/kernel": (3e-3, 0.9, [5, 4, 3, 2, 1], True),
    "llama/norm/scale": (3e-3, 0.9, 0, False),
    "cross/q/kernel": (3e-3, 0.9, [5, 3, 1], True),  # layers 0, 2 and 4
    "cross/norm1/scale": (3e-3, 0.9, [5, 3, 1], False),
    "queries": (3e-3, 0.9, 6, True),
    "pool/proj/kernel": (1e-2, 1.0, 0, True),
    "logit_scale": (3e-3, 0.9, 6, True),
}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {p: (scale * rng.normal(size=s)).astype(np.float32) for p, s in SHAPES.items()}


def numpy_adamw(params, gradients_per_step, steps):
    """The formula of the module docstring, in float64."""
    params = {p: x.astype(np.float64) for p, x in params.items()}
    m = {p: np.zeros_like(x) for p, x in params.items()}
    v = {p: np.zeros_like(x) for p, x in params.items()}
    for t, gradients in enumerate(gradients_per_step):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        warmup = min(1.0, (t + 1) / 2)
        progress = max(0.0, (t - 2) / (steps - 2))
        fraction = warmup * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)))
        for p in params:
            peak, rate, exponent, decays = EXPECTED[p]
            g = gradients[p].astype(np.float64) * min(1.0, 0.7 / norm)
            m[p] = 0.9 * m[p] + 0.1 * g
            v[p] = 0.95 * v[p] + 0.05 * g**2
            u = (m[p] / (1 - 0.9 ** (t + 1))) / (np.sqrt(v[p] / (1 - 0.95 ** (t + 1))) + 1e-6)
            factor = rate ** np.asarray(exponent, np.float64)
            factor = factor.reshape(factor.shape + (1,) * (u.ndim - factor.ndim))
            params[p] = params[p] - peak * factor * fraction * (u + decays * 0.1 * params[p])
    return params


def test_updates_are_those_of_adamw_written_out():
    steps = 6
    params = random_tree(0)
    # Half of the gradients are small enough not to be clipped.
    gradients = [random_tree(t, scale=0.02 if t % 2 else 1.0) for t in range(1, steps + 1)]
    tree = jax.tree.map(jnp.asarray, rules.unflatten(params))
    tx, learning_rate = optimizer.make_optimizer(CONFIG, tree, steps=steps, cross_every=2)
    state = tx.init(tree)
    for t, g in enumerate(gradients):
        updates, state = tx.update(rules.unflatten(g), state, tree, step=jnp.int32(t))
        tree = jax.tree.map(jnp.add, tree, updates)
    for path, value in numpy_adamw(params, gradients, steps).items():
        np.testing.assert_allclose(
            rules.flatten(tree)[path], value, rtol=2e-5, atol=2e-6, err_msg=path
        )
    assert float(learning_rate(0)) == pytest.approx(0.5e-2)  # half-way through the warm-up


def test_moments_and_updates_follow_the_sharding_of_the_parameters():
    mesh = jax.make_mesh((2, 4), ("replica", "fsdp"))
    tree = {"vit": {"blocks": {"fc1": {"kernel": np.ones((3, 8, 4), np.float32)}}}}
    config = {**CONFIG, "learning_rate": ((".*", 0.1),), "layer_decay": (("vit", 0.5),)}
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "fsdp", None))
        params = jax.device_put(tree, sharding)
        tx, _ = optimizer.make_optimizer(config, params, steps=5)
        state = jax.jit(tx.init)(params)
        moments = [x for x in jax.tree.leaves(state) if x.ndim == 3]
        assert len(moments) == 2
        assert all(x.sharding.is_equivalent_to(sharding, 3) for x in moments)
        step = jax.jit(lambda g, s, p: tx.update(g, s, p, step=jnp.int32(4)))
        updates, _ = step(params, state, params)
    update = updates["vit"]["blocks"]["fc1"]["kernel"]
    assert update.sharding.is_equivalent_to(sharding, 3)
    ratios = np.asarray(update)[:, 0, 0] / np.asarray(update)[-1, 0, 0]
    np.testing.assert_allclose(ratios, [0.25, 0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_at_every_step(name, expected):
    schedule = optimizer.make_schedule(name, steps=6, warmup_steps=2)
    np.testing.assert_allclose([schedule(t) for t in range(8)], expected, atol=1e-6)


def test_final_fraction_is_where_the_schedule_ends():
    schedule = optimizer.make_schedule("linear", steps=10, final_fraction=0.2)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10)], [1.0, 0.6, 0.2], atol=1e-6)


def test_wrong_settings_are_named():
    tree = rules.unflatten(random_tree(0))
    with pytest.raises(ValueError, match="'cosinus'; known are cosine, linear, constant"):
        optimizer.make_schedule("cosinus", steps=5)
    with pytest.raises(ValueError, match="warmup_steps=5 leaves nothing of steps=5"):
        optimizer.make_schedule("cosine", steps=5, warmup_steps=5)
    with pytest.raises(ValueError, match="'bert'; towers are vit, llama, llm"):
        optimizer.rate_multipliers(tree, ((".*", 1.0),), (("bert", 0.9),))
    with pytest.raises(ValueError, match="no llm/blocks"):
        optimizer.rate_multipliers(tree, ((".*", 1.0),), (("llm", 0.9),))
    with pytest.raises(rules.RuleError, match=r"match no optimizer\.learning_rate rule"):
        optimizer.rate_multipliers(tree, (("vit/.*", 1.0),))


def test_depth_of_a_frozen_tower_still_counts_for_what_hangs_on_it():
    tree = rules.unflatten(random_tree(0))
    cross = {"cross": tree["cross"]}
    with pytest.raises(ValueError, match="no llama/blocks"):
        optimizer.rate_multipliers(cross, ((".*", 1.0),), (("llama", 0.5),))
    rates = optimizer.rate_multipliers(
        cross, ((".*", 1.0),), (("llama", 0.5),), all_params=tree, every=2
    )
    np.testing.assert_allclose(rates["cross"]["norm1"]["scale"].ravel(), [2**-5, 2**-3, 2**-1])


def test_groups_count_their_parameters():
    tree = rules.unflatten(random_tree(0))
    first, second = optimizer.describe_groups(tree, CONFIG["learning_rate"])
    assert first.parameters == 48 + 20 + 144 + 12 + 24
    assert first.parameters + second.parameters == sum(x.size for x in rules.flatten(tree).values())
    assert str(second).startswith(".*: peak learning rate 0.003, ")
