"""What one training step reads and returns: parameters, optimizer state and counters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax import rules
from internvl_jax.models import int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of a run; the data position is a function of `step` alone.

    step: int32, updates attempted so far; also the index of the next batch.
    trainable, frozen: nested dicts of arrays; together the model's parameters. What is frozen has
      neither gradients nor moments: it is not an argument of the differentiated function.
    opt_state: the optimizer's moments, for `trainable` only.
    skipped: int32, updates left out because the loss or the gradient was not finite.
    nonfinite_in_a_row: int32, how many of these the run ends with at this moment.
    """

    step: jax.Array
    trainable: dict
    frozen: dict
    opt_state: Any
    skipped: jax.Array
    nonfinite_in_a_row: jax.Array

    @property
    def params(self) -> dict:
        """All parameters as one nested dict."""
        return rules.merge(self.trainable, self.frozen)


def create(params: dict, trainable: str, tx: optax.GradientTransformation) -> TrainState:
    """The state at step 0; `trainable` is a regex that must match a path as a whole.

    Works on arrays and, under `jax.eval_shape`, on their shapes. Under an explicit mesh the
    moments are born with the sharding of their parameters. Raises RuleError if nothing matches,
    Int8Error for weights that are held in int8.
    """
    int8.refuse(params, "training")
    learned, frozen = rules.partition(params, trainable)
    # Three separate zeros: the state is donated, and one buffer cannot be donated twice.
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, learned, frozen, tx.init(learned), skipped, in_a_row)


def on_mesh(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes with the shardings of this mesh's devices, as `Checkpoints.restore` needs them.

    `tree` comes from `jax.eval_shape` under the mesh, where a sharding names the axes but not the
    devices, and a scalar has none.
    """

    def place(leaf):
        sharding = getattr(leaf, "sharding", None)
        spec = PartitionSpec() if sharding is None else sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
