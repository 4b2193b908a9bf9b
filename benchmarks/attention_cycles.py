"""What attention costs on a TPU by the compiler's own schedule, beside XLA and JAX's own kernels.

    python benchmarks/attention_cycles.py [--sizes 257x32 …] [--paths fused …] [--json FILE]

One chip, bfloat16, forward and backward of InternViT-6B's attention sublayer: RMSNorm, projection,
QK-norm, attention of 25 heads × 128, output projection, LayerScale, residual. "Adds" is what a path
takes beyond `none`, the same sublayer with the product q · k · v in attention's place; the fused
kernel also does the QK-norm, which `none` and the others leave to XLA. Kernel cycles are those in
which a kernel issues; its floor is the time for its bytes from and to HBM, in the same cycles. No
TPU runs: these are the compiler's numbers, for comparing one version of the same work with another.
Needs libtpu; a case takes a minute of two idle cores.
"""

import argparse
import functools
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from internvl_jax import kernels, sharding
from internvl_jax.plan import chips, hlo, schedule, topology
from internvl_jax.plan import kernels as schedules

HEADS, DIM, EPS = 25, 128, 1e-6
WIDTH = HEADS * DIM
SIZES = ("257x32", "1025x8", "99x64")  # tokens × batch
FLASH_BLOCKS = (
    *("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv"),
    *("block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq"),
)
SPLASH_BLOCKS = (
    *("block_q", "block_kv", "block_kv_compute", "block_q_dkv"),
    *("block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
)


def rms_norm(x, weight):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    return wide.astype(x.dtype) * weight


def separate(attend):
    """Attention between XLA's QK-norm and head split, for paths that take [B, T, H, D]."""

    def run(qkv, query_weight, key_weight):
        query, key, value = jnp.split(qkv, 3, axis=-1)
        query, key = rms_norm(query, query_weight), rms_norm(key, key_weight)
        parts = (x.reshape(*x.shape[:2], HEADS, DIM) for x in (query, key, value))
        return attend(*parts).reshape(query.shape)

    return run


def padded(attend):
    """For kernels on [B, H, T, D] with T in whole tiles; the padding is a segment of its own."""

    def run(*parts):
        length = parts[0].shape[1]
        whole = -(-length // 128) * 128
        gap = ((0, 0), (0, whole - length), (0, 0), (0, 0))
        segments = (jnp.arange(whole) >= length).astype(jnp.int32)
        out = attend(*(jnp.pad(x, gap).transpose(0, 2, 1, 3) for x in parts), segments)
        return out.transpose(0, 2, 1, 3)[:, :length]

    return run


def stock_flash(query, key, value, segments):
    batch, _, length, _ = query.shape
    ids = jnp.broadcast_to(segments, (batch, length))
    return flash.flash_attention(
        query, key, value, segment_ids=flash.SegmentIds(ids, ids), sm_scale=DIM**-0.5,
        block_sizes=flash.BlockSizes(block_b=1, **dict.fromkeys(FLASH_BLOCKS, length)),
    )  # fmt: skip


def stock_splash(query, key, value, segments):
    length = query.shape[2]
    run = splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([splash_mask.FullMask((length, length))] * HEADS),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**dict.fromkeys(SPLASH_BLOCKS, length)),
    )
    ids = splash.SegmentIds(segments, segments)
    return jax.vmap(lambda q, k, v: run(q * DIM**-0.5, k, v, segment_ids=ids))(query, key, value)


def fused(qkv, query_weight, key_weight):
    return kernels.attention_qkv(
        qkv,
        num_heads=HEADS,
        qk_norm=(query_weight, key_weight),
        eps=EPS,
        implementation="pallas_tpu",
    )


PATHS = {
    "none": separate(lambda query, key, value: query * key * value),
    "xla": separate(functools.partial(kernels.attention, implementation="xla")),
    "flash": separate(padded(stock_flash)),
    "splash": separate(padded(stock_splash)),
    "fused": fused,
}


def sublayer(attend, x, w):
    mixed = attend(rms_norm(x, w["norm"]) @ w["qkv"], w["query_norm"], w["key_norm"])
    return x + w["scale"] * (mixed @ w["out"] + w["bias"])


def measure(name, tokens, batch, chip, device, dump):
    """Cycles and memory of one path, forward and backward."""
    mesh = sharding.make_mesh(devices=[device])
    with jax.set_mesh(mesh):
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=everywhere)
        shapes = dict.fromkeys(("norm", "query_norm", "key_norm", "bias", "scale"), (WIDTH,))
        shapes |= {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH)}
        weights = {name: array(shape) for name, shape in shapes.items()}

        def loss(x, w):
            return jnp.sum(jnp.square(sublayer(PATHS[name], x, w).astype(jnp.float32)))

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        schedules.clear(dump)
        traced = step.trace(array((batch, tokens, WIDTH)), weights)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    issue = schedules.cycles(dump, text)
    floor = {k: b / chip.hbm_bandwidth * chip.clock for k, b in hbm_bytes(text).items()}
    rest = schedule.read(text, chip, [(0,) * chip.dimensions], (1,) * chip.dimensions)
    return {
        "path": name,
        "tokens": tokens,
        "batch": batch,
        "kernel_cycles": sum(issue.values()),
        "xla_cycles": round(rest.compute_seconds * chip.clock),
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "kernels": {k: {"cycles": n, "floor": round(floor[k])} for k, n in issue.items()},
    }


def hbm_bytes(text):
    """Bytes that each Pallas call reads and writes."""
    found = {}
    for body in hlo.parse(text).computations.values():
        shapes = {i.name: i.shape for i in body}
        for i in body:
            if 'custom_call_target="tpu_custom_call"' in i.attributes:
                found[i.name] = sum(map(hlo.bytes_of, [i.shape, *(shapes[o] for o in i.operands)]))
    return found


def show(row, base):
    total = row["kernel_cycles"] + row["xla_cycles"]
    adds = "" if base is None else f"{(total - base) / 1e6:8.2f}"
    parts = "; ".join(f"{k} {v['cycles'] / 1e6:.3f} (floor {v['floor'] / 1e6:.3f})"
                      for k, v in row["kernels"].items())  # fmt: skip
    print(
        f"{row['tokens']:5} × {row['batch']:<3} {row['path']:7} {total / 1e6:8.2f} {adds:>8} "
        f"{row['kernel_cycles'] / 1e6:8.3f} {row['temp_mib']:9.0f}  {parts}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="tokens x batch")
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chip, _ = chips.parse(arguments.topology)
    rows = []
    print("millions of cycles    total     adds  kernels  temp MiB  each kernel")
    dump = schedules.keep_schedules()
    with topology.opened(arguments.topology) as devices:
        for size in arguments.sizes:
            tokens, batch = map(int, size.split("x"))
            base = None
            for path in arguments.paths:
                row = measure(path, tokens, batch, chip, devices[0], dump)
                if path == "none":
                    base = row["kernel_cycles"] + row["xla_cycles"]
                rows.append(row)
                show(row, base)
    if arguments.json:
        versions = {"jax": jax.__version__, "numpy": np.__version__}
        found = {"topology": arguments.topology, "versions": versions, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
