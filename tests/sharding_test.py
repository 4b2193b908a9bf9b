"""What of the mesh depends on the chips, on devices that only the TPU compiler knows."""

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


