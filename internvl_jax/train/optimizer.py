"""AdamW with a learning rate per parameter, built from `config.optimizer`.

The update of parameter p at step t (Loshchilov & Hutter 2019, decoupled weight decay):

    g ← g · min(1, clip_norm / ‖g‖)          over all trainable parameters together
    u = m̂ / (√v̂ + eps)                       Adam's bias-corrected moments
    p ← p − rate_p · schedule(t) · (u + weight_decay · p)

rate_p is the peak of the first learning-rate rule that matches p, times the layer decay; one
schedule in [0, 1] moves all rates together. Freezing is not expressed here: a frozen parameter is
no part of the tree (`state.create`).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax import rules

# Parameters that sit below a tower's first block, and so decay most. The paper's fine-tuning counts
# queries and temperature with the language tower's embeddings.
_BELOW_BLOCKS = {
    "vit": r"vit/(patch_embed/.*|class_embedding|position_embedding)",
    "llama": r"llama/embed/.*|queries|logit_scale",
    "llm": r"llm/embed/.*",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """One learning-rate rule and what it governs."""

    regex: str
    peak: float
    leaves: int
    parameters: int

    def __str__(self) -> str:
        count = f"{self.parameters:,} parameters in {self.leaves} arrays"
        return f"{self.regex}: peak learning rate {self.peak:g}, {count}"


def make_schedule(
    name: str, *, steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> Callable[[Any], jax.Array]:
    """Fraction of the peak rate at each step: linear warm-up, then the named course.

    name: "cosine", "linear" (both reach `final_fraction` at `steps`) or "constant".
    The warm-up reaches 1 at its last step and never gives 0, so no step is idle.
    """
    courses = {
        "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
        "linear": lambda x: 1 - x,
        "constant": lambda x: jnp.ones_like(x),
    }
    if name not in courses:
        raise ValueError(f"optimizer.schedule={name!r}; known are {', '.join(courses)}")
    if warmup_steps >= steps and name != "constant":
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} leaves nothing of steps={steps} for the "
            f"{name} schedule; shorten the warm-up"
        )
    final = 1.0 if name == "constant" else final_fraction

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        progress = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
        return warmup * (final + (1 - final) * courses[name](progress))

    return schedule


def stack_depth(path: str, leaf: Any) -> int | None:
    """Length of the leading layer axis of a stacked parameter, or None for a plain one."""
    stacked = "/blocks/" in path or path.startswith("cross/")
    return leaf.shape[0] if stacked else None


def decay_mask(params: dict, no_decay: str) -> dict:
    """Tree of bools: True where weight decay applies.

    Exempt are paths that match `no_decay` and every parameter with one axis (two when stacked):
    norm scales, biases, layer scales. A scalar is not exempt, as in the original's grouping.
    """
    exempt = re.compile(no_decay)

    def decays(path, leaf):
        axes = leaf.ndim - (stack_depth(path, leaf) is not None)
        return axes != 1 and not exempt.fullmatch(path)

    return rules.unflatten({p: decays(p, leaf) for p, leaf in rules.flatten(params).items()})


def layer_scale(path: str, leaf: Any, tower: str, rate: float, depth: int, every: int):
    """Layer-wise factor of one parameter for one tower, or None if it is outside the tower.

    rate^(n − id − 1) with n = depth + 2 and id 0 below the blocks, i + 1 in block i; at most 1.
    Stacked parameters get a vector [layers, 1, …]. `every`: cross-attention sits in the layers
    0, every, 2·every, … of the language tower.
    """
    if re.fullmatch(_BELOW_BLOCKS[tower], path):
        return np.float32(min(1.0, rate ** (depth + 1)))
    if path.startswith(f"{tower}/blocks/"):
        layers = np.arange(leaf.shape[0])
    elif tower == "llama" and path.startswith("cross/"):
        layers = np.arange(leaf.shape[0]) * every
    elif path.startswith(f"{tower}/"):
        return np.float32(1.0)
    else:
        return None
    scale = np.minimum(1.0, rate ** (depth - layers).astype(np.float64)).astype(np.float32)
    return scale.reshape((-1,) + (1,) * (leaf.ndim - 1))


def rate_multipliers(
    params: dict, learning_rate, layer_decay=(), *, all_params: dict | None = None, every: int = 2
) -> dict:
    """Peak learning rate of each parameter, as a scalar or a vector along the stacked axis.

    learning_rate: ((regex, peak), …), the first whole match wins; every parameter needs one.
    layer_decay: ((tower, rate), …) with tower "vit", "llama" or "llm".
    all_params: where the depths of the towers are read, if part of a tower is frozen.
    """
    flat = rules.flatten(params)
    peaks = rules.match(flat, tuple(learning_rate), "optimizer.learning_rate rule")
    whole = rules.flatten(params if all_params is None else all_params)
    multipliers = {path: np.float32(peak) for path, peak in peaks.items()}
    for tower, rate in layer_decay:
        if tower not in _BELOW_BLOCKS:
            raise ValueError(
                f"optimizer.layer_decay names {tower!r}; towers are {', '.join(_BELOW_BLOCKS)}"
            )
        depths = {leaf.shape[0] for p, leaf in whole.items() if p.startswith(f"{tower}/blocks/")}
        if len(depths) != 1:
            raise ValueError(
                f"optimizer.layer_decay names {tower!r}, but the model has no {tower}/blocks"
            )
        depth = depths.pop()
        for path, leaf in flat.items():
            factor = layer_scale(path, leaf, tower, rate, depth, every)
            if factor is not None:
                multipliers[path] = multipliers[path] * factor
    return rules.unflatten(multipliers)


def describe_groups(params: dict, learning_rate) -> list[Group]:
    """The learning-rate rules in order, each with the number of parameters it governs."""
    flat = rules.flatten(params)
    indices = [(regex, i) for i, (regex, _) in enumerate(learning_rate)]
    rule_of = rules.match(flat, indices, "optimizer.learning_rate rule")
    groups = []
    for i, (regex, peak) in enumerate(learning_rate):
        leaves = [leaf for path, leaf in flat.items() if rule_of[path] == i]
        groups.append(Group(regex, peak, len(leaves), sum(leaf.size for leaf in leaves)))
    return groups


def scale_by_rates(
    multipliers: dict, schedule: Callable[[Any], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """Multiply updates by −multiplier · schedule(step); `step` is an argument of `update`.

    The step comes from the train state, not from a counter of its own, so that a skipped update
    still moves the schedule and the run ends where its config says.
    """

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, step, **extra):
        del params, extra
        fraction = schedule(step)
        updates = jax.tree.map(
            lambda u, m: -u * (m * fraction).astype(u.dtype), updates, multipliers
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def make_optimizer(
    config: Mapping[str, Any],
    params: dict,
    *,
    steps: int,
    all_params: dict | None = None,
    cross_every: int = 2,
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any], jax.Array]]:
    """(transformation, learning-rate schedule) of a run.

    config: `config.optimizer`: learning_rate, schedule, warmup_steps, final_fraction, b1, b2, eps,
      weight_decay, no_decay, clip_norm (None: no clipping), layer_decay.
    params: the trainable parameters or their shapes. all_params, cross_every: `rate_multipliers`.
    The returned schedule gives the highest rate of any group at a step, for the log.
    """
    schedule = make_schedule(
        config["schedule"],
        steps=steps,
        warmup_steps=config["warmup_steps"],
        final_fraction=config.get("final_fraction", 0.0),
    )
    multipliers = rate_multipliers(
        params,
        config["learning_rate"],
        config.get("layer_decay", ()),
        all_params=all_params,
        every=cross_every,
    )
    stages = []
    if config.get("clip_norm") is not None:
        stages.append(optax.clip_by_global_norm(config["clip_norm"]))
    stages.append(optax.scale_by_adam(config["b1"], config["b2"], config["eps"]))
    if config["weight_decay"]:
        mask = decay_mask(params, config.get("no_decay", ""))
        stages.append(optax.add_decayed_weights(config["weight_decay"], mask=mask))
    stages.append(scale_by_rates(multipliers, schedule))
    peak = max(float(np.max(m)) for m in rules.flatten(multipliers).values())
    return optax.chain(*stages), lambda step: peak * schedule(step)
