"""What of the mesh depends on the chips, on devices that only the TPU compiler knows."""

import jax
import pytest

from internvl_jax import sharding
from internvl_jax.plan import topology


@pytest.mark.slow
def test_slices_hold_whole_replicas():
    from jax.experimental import topologies

    with topology.opened("v5e:2x2"):
        described = topologies.get_topology_desc("v5e:2x2", "tpu", num_slices=2)
    devices = list(described.devices)
    mesh = sharding.make_mesh(replica=4, fsdp=-1, tensor=1, devices=devices)
    assert dict(mesh.shape) == {"replica": 4, "fsdp": 2, "tensor": 1}
    slices = [[device.slice_index for device in replica.flat] for replica in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(sharding.MeshError, match="replica = 1 does not divide over 2 slices"):
        sharding.make_mesh(replica=1, fsdp=8, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_", "kib"),
    [("v5e:2x2", 48 * 1024), ("v5p:2x2x1", 32 * 1024), ("v6e:2x2", 48 * 1024), ("v4:2x2x1", None)],
)
def test_a_fusion_may_use_a_share_of_the_vector_memory(slice_, kib):
    """Half of a v4's would be less than the compiler grants by itself."""
    with topology.opened(slice_) as devices:
        mesh = sharding.make_mesh(fsdp=-1, devices=devices)
        with jax.set_mesh(mesh):
            options = sharding.compiler_options()
    assert options["xla_enable_async_all_gather"]
    assert options.get("xla_tpu_scoped_vmem_limit_kib") == kib


def test_a_cpu_has_no_compiler_options():
    assert sharding.compiler_options() is None
