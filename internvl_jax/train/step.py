"""One optimizer update as one compiled function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from internvl_jax import rules
from internvl_jax.train.state import TrainState

# (params, batch, key) → (loss, metrics): float32 scalars.
LossFunction = Callable[[dict, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_train_step(
    loss_fn: LossFunction,
    tx: optax.GradientTransformationExtraArgs,
    *,
    seed: int,
    learning_rate: Callable[[Any], jax.Array] | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiled `step(state, batch) -> (state, metrics)`; the state passed in is donated.

    loss_fn: `(params, batch, key) -> (loss, metrics)` over the whole parameter tree; only
      `state.trainable` is differentiated. `key` depends on `seed` and `state.step` alone, so a
      resumed run draws what the uninterrupted one would have drawn.
    learning_rate: schedule to report, from `optimizer.make_optimizer`.

    Metrics: those of the objective and loss, grad_norm (before clipping), learning_rate, skipped,
    nonfinite_in_a_row. A loss or gradient norm that is not finite leaves parameters and moments
    exactly as they were; the step counts all the same, so the data moves on.
    """

    def losses(trainable, frozen, batch, key):
        return loss_fn(rules.merge(trainable, frozen), batch, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: dict):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # Gradient accumulation would be a scan over micro-batches around this one line.
        (loss, metrics), gradients = jax.value_and_grad(losses, has_aux=True)(
            state.trainable, state.frozen, batch, key
        )
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(gradients, state.opt_state, state.trainable, step=state.step)
        updated = optax.apply_updates(state.trainable, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        failed = 1 - finite.astype(jnp.int32)
        in_a_row = failed * (state.nonfinite_in_a_row + 1)
        new_state = TrainState(
            step=state.step + 1,
            trainable=keep(updated, state.trainable),
            frozen=state.frozen,
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + failed,
            nonfinite_in_a_row=in_a_row,
        )
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": norm,
            "skipped": new_state.skipped,
            "nonfinite_in_a_row": in_a_row,
        }
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.step)
        return new_state, metrics

    return step
