"""One optimizer update as one compiled function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from internvl_jax import compiler
from internvl_jax.objectives import Objective
from internvl_jax.sharding import spec
from internvl_jax.train.gradients import Bind, value_and_grad
from internvl_jax.train.state import TrainState


def example_keys(seed: int, step: jax.Array, batch: dict) -> jax.Array:
    """A random key for each example of a batch: of the seed, the step and its row, no more."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], out_sharding=spec("batch"))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def make_train_step(
    objective: Objective,
    bind: Bind,
    tx: optax.GradientTransformationExtraArgs,
    *,
    seed: int,
    chunks: int = 1,
    held_towers: int = 1,
    learning_rate: Callable[[Any], jax.Array] | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiled `step(state, batch) -> (state, metrics)`; the state passed in is donated.

    Call it under the mesh on which the step will run: its platform decides how it is compiled.

    bind: the whole parameter tree → the model; only `state.trainable` is differentiated.
    seed: of what is random in the objective. An example's key depends on it, on `state.step` and on
      the example's row, so a resumed run draws what the uninterrupted one would have drawn.
    chunks, held_towers: see `gradients`.
    learning_rate: schedule to report, from `optimizer.make_optimizer`.

    Metrics: those of the objective and loss, grad_norm (before clipping), learning_rate, skipped,
    nonfinite_in_a_row. A loss or gradient norm that is not finite leaves parameters and moments
    exactly as they were; the step counts all the same, so the data moves on.
    """

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler.options())
    def step(state: TrainState, batch: dict):
        keys = example_keys(seed, state.step, batch)
        (loss, metrics), gradients = value_and_grad(
            objective, bind, state.trainable, state.frozen, batch, keys, chunks, held_towers
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
