"""The mesh and the one place where logical axis names become partition specs.

Every array axis that may be sharded has a logical name. Weights of the language side are sharded
over `fsdp` on their width and over `tensor` on heads or MLP; weights of the vision tower only over
`fsdp`, on their widest axis: InternViT has 25 heads and width 3200 = 2^7 · 25, so neither divides
usefully, while 9600 = 128 · 75 and 12800 = 128 · 100 do. Vocabulary axes stay whole, since
49,954 = 2 · 24,977.
"""

import contextlib
import math
from typing import Any, Protocol

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("replica", "fsdp", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("replica", "fsdp"),
    "layers": None,
    "vit_wide": "fsdp",  # the longer axis of each vision weight: 3·width, mlp_dim, width
    "embed": "fsdp",  # the width of the language side
    "heads": "tensor",  # query heads × head_dim of the language side
    "kv_heads": "tensor",  # key/value heads × head_dim
    "mlp": "tensor",
    "positions": "tensor",  # of the residual stream, between products that `tensor` shares
}


class MeshError(ValueError):
    """The mesh does not fit the devices, or a model dimension does not divide over it."""


class ShardedModel(Protocol):
    """A model configuration that can list the dimensions which the mesh must divide."""

    def sharded_dimensions(self) -> list[tuple[str, int, str]]: ...


def make_mesh(
    replica: int = 1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None
) -> Mesh:
    """Build the (replica, fsdp, tensor) mesh; at most one size may be -1 for "what is left".

    Of several TPU slices, each holds whole replicas: between slices, over the data-centre network,
    only the gradients of replicas travel.

    Raises:
        MeshError: the product of the sizes is not the number of devices, or replicas do not divide
            over the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"mesh sizes must be positive and at most one of them -1, got {sizes}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and len(devices) % known == 0:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        shape = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise MeshError(
            f"mesh {shape} does not fit {len(devices)} {devices[0].platform} device(s); "
            "choose sizes whose product is the device count, or set one of them to -1"
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    explicit = (AxisType.Explicit,) * 3
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # `jax.make_mesh` splits an axis of the torus on v5e alone; 128 shards need it on all chips.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=explicit)
    if sizes["replica"] % slices:
        raise MeshError(
            f"mesh.replica = {sizes['replica']} does not divide over {slices} slices; choose a "
            "multiple of the slices, since fsdp and tensor are too talkative for the network "
            "between them"
        )
    within = (sizes["replica"] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=explicit)


def physical(logical: str | None) -> str | tuple[str, ...] | None:
    """The mesh axis (or axes) on which a logical axis lies; None for an unsharded axis."""
    return None if logical is None else LOGICAL_AXES[logical]


def platform() -> str:
    """Platform of the current mesh's devices ("tpu" also where only its compiler is at hand),
    or of JAX's default backend outside any mesh."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def spec(*logical: str | None) -> P | None:
    """Partition spec of an array whose axes have these logical names.

    Returns None outside any mesh, which every JAX function takes as "leave it alone": the same
    model code then runs unsharded.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return P(*(physical(name) for name in logical))


def positions_axis(length: int) -> str | None:
    """The logical name of the positions of a residual stream [B, length, W] of the language side.

    "positions" where they divide over `tensor`, so that its devices share what lies between two
    products (norms, sums, what is kept for the backward pass) instead of all doing it whole
    (sequence parallelism, Korthikanti et al. 2022, §4.2.2); else None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if mesh.empty else axis_size(mesh, "positions")
    return "positions" if size > 1 and length % size == 0 else None


def laid_positions(x: jax.Array) -> str | None:
    """The logical name by which the positions of x [B, T, …] lie on the mesh."""
    name = physical("positions")
    return "positions" if jax.typeof(x).sharding.spec[1] == name else None


def replicate(array: jax.Array) -> jax.Array:
    """Gather an array onto every device (the all-gather of contrastive features)."""
    return array if jax.sharding.get_abstract_mesh().empty else jax.reshard(array, P())


def reshard(array: jax.Array, *logical: str | None) -> jax.Array:
    """An array laid over the current mesh as the logical names of its axes say."""
    out = spec(*logical)
    return array if out is None else jax.reshard(array, out)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading axis over replica and fsdp."""
    return NamedSharding(mesh, P(LOGICAL_AXES["batch"]))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, ascending.

    Where the tensor axis, or the order of a TPU's devices, runs across processes, two of them hold
    the same rows or one holds rows that are not neighbours.
    """
    where = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in where.values() for row in range(batch_size)[part]})


def place_batch(arrays: Any) -> Any:
    """Host arrays over the current mesh, the leading axis as `batch_sharding` has it.

    Every process passes the whole arrays; outside any mesh they go to the first device.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(arrays)
    place = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), arrays
    )


def ambient_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Context in which `mesh` is the current mesh, or which changes nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_pieces() -> int:
    """Into how many pieces the current mesh cuts a batch; 1 outside any mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else axis_size(mesh, "batch")


def axis_size(mesh: Mesh | AbstractMesh, logical: str) -> int:
    """Number of pieces into which `mesh` cuts an axis of this logical name."""
    axes = LOGICAL_AXES[logical]
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    return math.prod(mesh.shape[a] for a in axes)


def check_divisible(
    config: ShardedModel, mesh: Mesh, batch_size: int | None = None, chunks: int = 1
) -> None:
    """Check every sharded dimension of a model, and the batch, against the mesh at once.

    Raises:
        MeshError: names each dimension that does not divide, its size and the mesh axis.
    """
    wrong = [
        f"{name} = {size} over {LOGICAL_AXES[axis]} = {axis_size(mesh, axis)}"
        for name, size, axis in dict.fromkeys(config.sharded_dimensions())
        if size % axis_size(mesh, axis)
    ]
    pieces = axis_size(mesh, "batch")
    if batch_size is not None and batch_size % (pieces * chunks):
        over = f"{LOGICAL_AXES['batch']} = {pieces}"
        over += f" and then {chunks} chunks" if chunks > 1 else ""
        wrong.append(f"batch_size = {batch_size} over {over}")
    if wrong:
        raise MeshError(
            "these dimensions do not divide over the mesh "
            f"{dict(mesh.shape)}: {'; '.join(wrong)}. Choose smaller mesh axes that divide them"
        )
