"""Products with weights that lie spread over the mesh: who gathers what, said outright.

A weight is cast, gathered over `fsdp` just before its product and dropped after it; its gradient is
summed and scattered in one step. Left to the compiler, the gradient's sum of some weights becomes
an all-reduce of the whole, and the gathers of InternViT's run on padded arrays: 12,800 / 128 = 100
and 9,600 / 128 = 75 rows do not fill the TPU's tiles of 8 × 128.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from internvl_jax.models.int8 import Int8
from internvl_jax.sharding import laid_positions, physical, platform, reshard, spec

_ROWS = 8  # of a tile
# Asked to scatter over so many devices that are a whole pod (v5e:8x8, v5p:4x4x4; v5e:16x16,
# v6e:16x16, v5p:4x8x8), the TPU compiler sums the whole; in two steps it scatters. Over a part of a
# pod it scatters at once. Gathers over the 64 of v5p:4x4x4 become sums as well.
_SCATTERED = {64: (16, 4), 256: (16, 16)}
_GATHERED = {64: (16, 4)}

Axes = tuple[str | None, str | None]


def product(
    x: jax.Array,
    kernel: jax.Array | Int8,
    axes: Axes = (None, None),
    out_axis: str | None = None,
    *,
    positions: str | None = None,
) -> jax.Array:
    """x [B, …, in] · kernel [in, out] in the dtype of x.

    axes: logical names of the kernel's axes; out_axis: of the result's last axis. The last axis of
    `x` is sharded as the kernel's first one is, except over `fsdp`.
    positions: "positions" scatters the second axis of a result that is summed over `tensor`.
    """
    return products(x, (kernel,), axes, out_axis, positions=positions)[0]


def products(
    x: jax.Array,
    kernels: Sequence[jax.Array | Int8],
    axes: Axes = (None, None),
    out_axis: str | None = None,
    *,
    positions: str | None = None,
) -> list[jax.Array]:
    """`product` of one `x` with several kernels, whose axes lie alike.

    Where `tensor` shares their columns, `x` may be spread over its second axis: it is gathered once
    for all, and of its gradients one sum is scattered.
    """
    if isinstance(kernels[0], Int8):
        values = [kernel.values for kernel in kernels]
        whole = products(x, values, axes, out_axis, positions=positions)
        scales = [reshard(kernel.scale[0], out_axis) for kernel in kernels]
        return [(y * s).astype(x.dtype) for y, s in zip(whole, scales, strict=True)]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        out = spec("batch", *(None,) * (x.ndim - 2), out_axis)
        one = _on_one_cpu if platform() == "cpu" and mesh.size <= 1 else _whole
        return [one(x, kernel.astype(x.dtype), out) for kernel in kernels]
    inner = None if physical(axes[0]) == "fsdp" else axes[0]
    nones = (None,) * (x.ndim - 3)
    spread = laid_positions(x) if x.ndim > 2 else None
    second = [() if x.ndim == 2 else (name,) for name in (spread, positions)]
    local = functools.partial(
        _local, axes=tuple(map(physical, axes)), gather=spread, scatter=positions
    )
    return jax.shard_map(
        local,
        in_specs=(spec("batch", *second[0], *nones, inner), [spec(*axes)] * len(kernels)),
        out_specs=[spec("batch", *second[1], *nones, out_axis)] * len(kernels),
    )(x, list(kernels))


def _whole(x: jax.Array, kernel: jax.Array, out: PartitionSpec | None) -> jax.Array:
    return jnp.einsum("b...d,df->b...f", x, kernel, out_sharding=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _on_one_cpu(x: jax.Array, kernel: jax.Array, out: PartitionSpec | None) -> jax.Array:
    """`_whole` with a gradient that XLA's products on a CPU compute up to twice as fast."""
    return _whole(x, kernel, out)


def _gradients_on_one_cpu(
    out: PartitionSpec | None, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Without the barriers the compiler lets the product walk across `x`, at half its rate where
    # kernels are large, and makes the factors again in transposed copies more often.
    x, kernel = saved
    x, dy = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(dy)
    across = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0))
    shardings = [None if out is None else jax.typeof(a).sharding.spec for a in saved]
    return (
        jnp.einsum("b...f,df->b...d", dy, kernel, out_sharding=shardings[0]),
        jnp.einsum("db...,b...f->df", across, dy, out_sharding=shardings[1]),
    )


_on_one_cpu.defvjp(
    lambda x, kernel, out: (_whole(x, kernel, out), (x, kernel)), _gradients_on_one_cpu
)


def _local(
    x: jax.Array, kernels: list[jax.Array], axes: Axes, gather: str | None, scatter: str | None
) -> list[jax.Array]:
    if gather:
        x = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
    elif axes[1] == "tensor":
        x = jax.lax.pcast(x, "tensor", to="varying")  # here, so that its gradients are summed once
    parts = [_part(x, kernel, axes) for kernel in kernels]
    if axes[0] != "tensor":
        return parts
    if scatter:
        sums = [jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True) for y in parts]
    else:
        sums = [jax.lax.psum(y, "tensor") for y in parts]
    return [checkpoint_name(y, "sum") for y in sums]


def _part(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    """What this device adds to, or holds of, the product."""
    if kernel.dtype != jnp.int8:  # which travels as it is
        kernel = kernel.astype(x.dtype)
    if "fsdp" in axes:
        # Each replica has its own gradient until it is scattered; then their small parts are added.
        kernel = jax.lax.pcast(kernel, "replica", to="varying")
    if axes[1] == "fsdp":
        return jnp.einsum("b...d,fd->b...f", x, gather_rows(kernel.T).astype(x.dtype))
    kernel = gather_rows(kernel) if axes[0] == "fsdp" else kernel
    return jnp.einsum("b...d,df->b...f", x, kernel.astype(x.dtype))


@jax.custom_vjp
def gather_rows(part: jax.Array) -> jax.Array:
    """[rows / fsdp, columns] of each device → [rows, columns], within a `shard_map`.

    The gradient is summed over `fsdp` and scattered back.
    """
    rows, columns = part.shape
    if rows % _ROWS == 0:
        shape = (rows, columns)
    elif rows % 2 == 0:  # such rows fill tiles of two
        shape = (rows // 2, 2, columns)
    else:
        shape = (rows, 2, columns // 2) if columns % 2 == 0 else (rows, columns)
    whole = gather(part.reshape(shape), _steps(_GATHERED))
    return whole.reshape(-1, columns)


def _scatter(shape: tuple[int, ...], gradient: jax.Array) -> tuple[jax.Array]:
    # The TPU compiler scatters an array of this form; most others it sums as a whole.
    rows, columns = shape
    lanes = next((n for n in (1280, 128) if rows * columns % n == 0), columns)
    flat = gradient.reshape(jax.lax.axis_size("fsdp"), rows * columns // lanes, lanes)
    part = scatter(flat, _steps(_SCATTERED))
    return (part.reshape(rows, columns),)


def _steps(of_pods: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Sizes of the groups among which a collective over `fsdp` runs, in order."""
    size = jax.lax.axis_size("fsdp")
    pod = all(jax.lax.axis_size(axis) == 1 for axis in ("replica", "tensor"))
    return of_pods.get(size, (size,)) if pod else (size,)


def scatter(x: jax.Array, steps: tuple[int, ...]) -> jax.Array:
    """[fsdp, …] of each device → [1, …]: the sum over `fsdp` of the part that is this device's.

    steps: sizes of groups, whose product is `fsdp`. Of two, the first groups are of devices a
    stride apart, the second of neighbours, among whom what is left is scattered.
    """
    if len(steps) == 1:
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    x = x.reshape(*steps, *x.shape[1:])
    strided, neighbours = _groups(*steps)
    x = jax.lax.psum_scatter(x, "fsdp", axis_index_groups=strided)
    return jax.lax.psum_scatter(x, "fsdp", axis_index_groups=neighbours)[None]


def gather(x: jax.Array, steps: tuple[int, ...]) -> jax.Array:
    """[rows, …] of each device → [fsdp · rows, …] of all; steps as in `scatter`, in reverse."""
    if len(steps) == 1:
        return jax.lax.all_gather(x, "fsdp", tiled=True)
    for groups in reversed(_groups(*steps)):
        x = jax.lax.all_gather(x, "fsdp", tiled=True, axis_index_groups=groups)
    return x


def _groups(far: int, near: int) -> tuple[list[list[int]], list[list[int]]]:
    strided = [[i * near + j for i in range(far)] for j in range(near)]
    neighbours = [[i * near + j for j in range(near)] for i in range(far)]
    return strided, neighbours


gather_rows.defvjp(lambda part: (gather_rows(part), part.shape), _scatter)
