"""Row and column log-sum-exps of A·Bᵀ when neither the matrix nor one factor fits on a device.

Each device keeps its rows of A. The rows of B travel around the ring of devices, one step at a
time, and take with them what belongs to them: the running log-sum-exp of their columns, and in the
backward pass their gradient. After a whole turn everything is home again. A step is worked through
in tiles of a bounded number of rows, so memory grows with the batch and not with its square. The
backward pass computes the tiles again from the saved log-sum-exps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from internvl_jax.sharding import LOGICAL_AXES

_TILE = 512  # rows of A whose products with a block of B exist at one time
_AXES = LOGICAL_AXES["batch"]


@jax.custom_vjp
def log_sum_exps(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log Σ_j exp(a_i·b_j), log Σ_i exp(a_i·b_j), and the column of the largest entry of each row.

    Args:
        a, b: float32 [B, E], sharded over the batch axes of the current mesh, or on one device.

    Returns:
        Rows and columns, float32 [B] each, and int32 [B] (the first of several largest), sharded
        as `a`. The last has no gradient.
    """
    return _on_every_device(_forward, 2, 3)(a, b)


def _save(a: jax.Array, b: jax.Array) -> tuple[Any, Any]:
    rows, columns, largest = log_sum_exps(a, b)
    return (rows, columns, largest), (a, b, rows, columns)


def _backward_of_saved(saved: Any, gradients: Any) -> tuple[jax.Array, jax.Array]:
    row_gradient, column_gradient, _ = gradients
    return _on_every_device(_backward, 6, 2)(*saved, row_gradient, column_gradient)


log_sum_exps.defvjp(_save, _backward_of_saved)


def _on_every_device(function: Callable[..., Any], inputs: int, outputs: int) -> Callable[..., Any]:
    """`function(ring, *local arrays)` on each device's rows; a ring of one without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return lambda *arrays: function(_Ring(()), *arrays)
    spec = P(_AXES)
    return jax.shard_map(
        lambda *arrays: function(_Ring(_AXES), *arrays),
        in_specs=(spec,) * inputs,
        out_specs=(spec,) * outputs,
        check_vma=False,
    )


class _Ring:
    """The devices that share the batch, in a circle."""

    def __init__(self, axes: tuple[str, ...]):
        self._axes = axes
        self.size = jax.lax.axis_size(axes) if axes else 1

    def turn(self, step: Callable[..., Any], staying: Any, travelling: Any) -> tuple[Any, Any]:
        """Apply `step(staying, travelling, origin)` `size` times, passing `travelling` on.

        origin: the position on the ring at which what travels has its home.
        """
        if self.size == 1:
            return step(staying, travelling, 0)
        here = jax.lax.axis_index(self._axes)
        onwards = [(i, (i + 1) % self.size) for i in range(self.size)]

        def body(number: jax.Array, state: Any) -> Any:
            staying, travelling = state
            staying, travelling = step(staying, travelling, (here - number) % self.size)
            moved = jax.tree.map(lambda x: jax.lax.ppermute(x, self._axes, onwards), travelling)
            return staying, moved

        return jax.lax.fori_loop(0, self.size, body, (staying, travelling))


def _tiled(x: Any) -> Any:
    """[m, …] → [m / tile, tile, …], with the largest tile up to the limit that divides m."""

    def cut(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        tile = max(size for size in range(1, min(rows, _TILE) + 1) if rows % size == 0)
        return x.reshape(rows // tile, tile, *x.shape[1:])

    return jax.tree.map(cut, x)


def _joined(x: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), x)


def _forward(ring: _Ring, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    count = a.shape[0]
    nothing = jnp.full((count,), -jnp.inf, jnp.float32)

    def step(staying: Any, travelling: Any, origin: Any) -> Any:
        b, columns = travelling

        def tile(columns: jax.Array, members: Any) -> Any:
            a, rows, value, index = members
            scores = jnp.einsum("id,jd->ij", a, b)
            rows = jnp.logaddexp(rows, jax.nn.logsumexp(scores, axis=1))
            columns = jnp.logaddexp(columns, jax.nn.logsumexp(scores, axis=0))
            here = origin * count + jnp.argmax(scores, axis=1).astype(jnp.int32)
            top = jnp.max(scores, axis=1)
            better = (top > value) | ((top == value) & (here < index))
            value, index = jnp.where(better, top, value), jnp.where(better, here, index)
            return columns, (rows, value, index)

        columns, rest = jax.lax.scan(tile, columns, _tiled((a, *staying)))
        return _joined(rest), (b, columns)

    staying = nothing, nothing, jnp.zeros((count,), jnp.int32)
    (rows, _, index), (_, columns) = ring.turn(step, staying, (b, nothing))
    return rows, columns, index


def _backward(
    ring: _Ring,
    a: jax.Array,
    b: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    row_gradient: jax.Array,
    column_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """d(log-sum-exp) is a softmax: dS = g_i·exp(S − rows_i) + h_j·exp(S − columns_j)."""

    def step(a_gradient: jax.Array, travelling: Any, origin: Any) -> Any:
        b, columns, column_gradient, b_gradient = travelling

        def tile(b_gradient: jax.Array, members: Any) -> Any:
            a, rows, row_gradient, a_gradient = members
            scores = jnp.einsum("id,jd->ij", a, b)
            by_rows = row_gradient[:, None] * jnp.exp(scores - rows[:, None])
            weights = by_rows + column_gradient * jnp.exp(scores - columns)
            b_gradient = b_gradient + jnp.einsum("ij,id->jd", weights, a)
            return b_gradient, a_gradient + jnp.einsum("ij,jd->id", weights, b)

        members = _tiled((a, rows, row_gradient, a_gradient))
        b_gradient, a_gradient = jax.lax.scan(tile, b_gradient, members)
        return _joined(a_gradient), (b, columns, column_gradient, b_gradient)

    travelling = b, columns, column_gradient, jnp.zeros_like(b)
    a_gradient, (*_, b_gradient) = ring.turn(step, jnp.zeros_like(a), travelling)
    return a_gradient, b_gradient
