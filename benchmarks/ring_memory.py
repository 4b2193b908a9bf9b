"""Memory of the contrastive loss on a pod, from the TPU compiler: the ring against the plain form.

    python benchmarks/ring_memory.py [TOPOLOGY]      (needs libtpu; v5e:16x16 by default)

Prints the temporaries per chip of loss and gradient for features of 768 numbers, at half, once and
twice stage 1's batch. The plain form's grow with the square of the batch.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from internvl_jax import losses, sharding
from internvl_jax.plan import compiling, topology

WIDTH, BATCHES = 768, (81_920, 163_840, 327_680)


def temporaries(mesh: jax.sharding.Mesh, batch: int, ring: bool) -> float:
    """MiB per chip; what the compiler would have needed where it does not fit."""

    def loss(image, text, scale):
        return losses.contrastive(image, text, scale, ring=ring)[0]

    place = sharding.batch_sharding(mesh)
    features = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32, sharding=place)
    whole = NamedSharding(mesh, PartitionSpec())
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    held = 2 * batch * WIDTH * 4 / mesh.size
    try:
        program, _ = compiling.compiled(step, (features, features, scale), mesh, held)
    except compiling.OutOfMemory as error:
        return error.needed / 2**20
    return program.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "v5e:16x16"
    with topology.opened(name) as devices:
        mesh = sharding.make_mesh(replica=-1, fsdp=128, devices=devices)
        print(f"{name}: MiB of temporaries per chip\n{'batch':>10} {'ring':>10} {'plain':>10}")
        for batch in BATCHES:
            ring, plain = (temporaries(mesh, batch, kind) for kind in (True, False))
            print(f"{batch:10,} {ring:10.1f} {plain:10.1f}", flush=True)


if __name__ == "__main__":
    main()
