"""What attention costs on a TPU by the compiler's own schedule, beside XLA and JAX's own kernels.

    python benchmarks/attention_cycles.py [--cases 257x32 …] [--paths own …] [--json FILE]

One chip, bfloat16, forward and backward of an attention sublayer:

* `257x32`, `1025x8`, `99x64` (tokens × images): InternViT-6B's, which is RMSNorm, projection,
  QK-norm, attention of 25 heads × 128, output projection, LayerScale, residual;
* `qllama`: QLLaMA's self-attention at stage 2, 96 rows of 96 queries and 80 words, a third each
  under the masks of matching, contrast and generation: RMSNorm, projections, rotary positions,
  attention of 32 heads × 128, output projection, residual;
* `cross`: QLLaMA's cross-attention, the 96 queries of 32 rows to 257 image tokens each;
* `causal`: a chat decoder's self-attention on 4 rows of 4096 positions, of 32 heads × 128.

"Adds" is what a path takes beyond `none`, the same sublayer with the product q · k · v in
attention's place; `own` is what the project takes on a TPU. At 257 and 99 tokens that does the
QK-norm too, which `none` and the others leave to XLA. The stock kernels know no mask that differs
by row: for `qllama` theirs is full. Kernel cycles are those in which a kernel issues; its floor is
the time for its bytes from and to HBM, in the same cycles. No TPU runs: these are the compiler's
numbers, for comparing one version of the same work with another. Needs libtpu; a path takes a
minute or more of two idle cores.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from internvl_jax import kernels, sharding
from internvl_jax.models import rope
from internvl_jax.plan import chips, hlo, kernel_times, schedule, topology

DIM, EPS = 128, 1e-6
VIT, LLAMA = 25 * DIM, 32 * DIM  # widths
ROWS, QUERIES, WORDS, IMAGES, TOKENS = 96, 96, 80, 32, 257
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


def padded(attend):
    """For kernels on [B, H, T, D] with T in whole tiles; the padding is a segment of its own."""

    def run(query, key, value, mask):
        causal = isinstance(mask, kernels.Causal)
        parts, segments = [], []
        for x in (query, key, value):
            length = x.shape[1]
            whole = -(-length // 128) * 128
            gap = ((0, 0), (0, whole - length), (0, 0), (0, 0))
            parts.append(jnp.pad(x, gap).transpose(0, 2, 1, 3))
            segments.append((jnp.arange(whole) >= length).astype(jnp.int32))
        return attend(*parts, *segments[:2], causal).transpose(0, 2, 1, 3)[:, : query.shape[1]]

    return run


def block(length):
    """Of JAX's own kernels: the whole of a short length; of a long one what serves splash best."""
    return length if length <= 1152 else 1024


def stock_flash(query, key, value, query_segments, key_segments, causal):
    batch = query.shape[0]
    ids = flash.SegmentIds(*(jnp.broadcast_to(s, (batch, len(s)))
                             for s in (query_segments, key_segments)))  # fmt: skip
    shape = [block(x.shape[2]) for x in (query, key)]
    blocks = {name: shape["_q" not in name] for name in FLASH_BLOCKS}
    return flash.flash_attention(
        query, key, value, segment_ids=ids, causal=causal, sm_scale=DIM**-0.5,
        block_sizes=flash.BlockSizes(block_b=1, **blocks),
    )  # fmt: skip


def stock_splash(query, key, value, query_segments, key_segments, causal):
    shape = query.shape[2], key.shape[2]
    sizes = [block(length) for length in shape]
    blocks = {name: sizes["kv" in name.removesuffix("_dkv")] for name in SPLASH_BLOCKS}
    mask = (splash_mask.CausalMask if causal else splash_mask.FullMask)(shape)
    run = splash.make_splash_mha(
        mask=splash_mask.MultiHeadMask([mask] * query.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**blocks),
    )
    ids = splash.SegmentIds(query_segments, key_segments)
    return jax.vmap(lambda q, k, v: run(q * DIM**-0.5, k, v, segment_ids=ids))(query, key, value)


def nothing(query, key, value, mask):
    """A product in attention's place."""
    if query.shape == key.shape:
        return query * key * value
    return query * jnp.mean(key * value, axis=1, keepdims=True)


def attention(implementation):
    return lambda query, key, value, mask: kernels.attention(
        query, key, value, mask=mask, implementation=implementation
    )


PATHS = {
    "none": nothing,
    "xla": attention("xla"),
    "flash": padded(stock_flash),
    "splash": padded(stock_splash),
    "own": attention(None),
}


def heads(x):
    return x.reshape(*x.shape[:2], -1, DIM)


def rows(x):
    return x.reshape(*x.shape[:2], -1)


def vit(path, x, w):
    """InternViT's sublayer on [B, T, W]."""
    qkv, norms = rms_norm(x, w["norm"]) @ w["qkv"], (w["query_norm"], w["key_norm"])
    if path in ("own", "xla"):
        mixed = kernels.attention_qkv(
            qkv,
            num_heads=VIT // DIM,
            qk_norm=norms,
            eps=EPS,
            implementation=None if path == "own" else path,
        )
    else:
        query, key, value = jnp.split(qkv, 3, axis=-1)
        query, key = (rms_norm(*pair) for pair in zip((query, key), norms, strict=True))
        mixed = rows(PATHS[path](heads(query), heads(key), heads(value), kernels.Full()))
    return x + w["scale"] * (mixed @ w["out"] + w["bias"])


def qllama(path, x, w):
    """QLLaMA's self-attention on [B, Q + T, W], a third of the rows under each mask."""
    modes = jnp.repeat(jnp.array([kernels.ITM, kernels.ITC, kernels.ITG]), ROWS // 3)
    return language(
        path, x, w, kernels.Middleware(QUERIES, modes) & kernels.Keys(w["valid"] != 0)
    )


def causal(path, x, w):
    """A chat decoder's self-attention on [B, T, W]."""
    return language(path, x, w, kernels.Causal())


def language(path, x, w, mask):
    tables = rope.tables(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), DIM, 1e4)
    normed = rms_norm(x, w["norm"])
    query, key, value = (heads(normed @ w[name]) for name in ("query", "key", "value"))
    query, key = rope.rotate(query, tables), rope.rotate(key, tables)
    return x + rows(PATHS[path](query, key, value, mask)) @ w["out"]


def cross(path, x, w):
    """QLLaMA's cross-attention, [B, Q, W] to image tokens [B, N, C]."""
    image = rms_norm(w["image"], w["image_norm"])
    query = heads(rms_norm(x, w["norm"]) @ w["query"])
    key, value = heads(image @ w["key"]), heads(image @ w["value"])
    return x + rows(PATHS[path](query, key, value, kernels.Full())) @ w["out"]


def vit_case(tokens, batch):
    shapes = dict.fromkeys(("norm", "query_norm", "key_norm", "bias", "scale"), (VIT,))
    shapes |= {"qkv": (VIT, 3 * VIT), "out": (VIT, VIT)}
    return vit, (batch, tokens, VIT), shapes


SQUARE = (LLAMA, LLAMA)
CASES = {  # sublayer, shape of its input, shapes of its weights and other inputs
    "257x32": vit_case(257, 32),
    "1025x8": vit_case(1025, 8),
    "99x64": vit_case(99, 64),
    "qllama": (
        qllama,
        (ROWS, QUERIES + WORDS, LLAMA),
        {"norm": (LLAMA,), "valid": (ROWS, QUERIES + WORDS)}
        | dict.fromkeys(("query", "key", "value", "out"), SQUARE),
    ),
    "cross": (
        cross,
        (IMAGES, QUERIES, LLAMA),
        {"norm": (LLAMA,), "image": (IMAGES, TOKENS, VIT), "image_norm": (VIT,)}
        | {"query": SQUARE, "key": (VIT, LLAMA), "value": (VIT, LLAMA), "out": SQUARE},
    ),
    "causal": (
        causal,
        (4, 4096, LLAMA),
        {"norm": (LLAMA,)} | dict.fromkeys(("query", "key", "value", "out"), SQUARE),
    ),
}


def measure(case, path, name, device):
    """Cycles and memory of one path, forward and backward, on a chip of the topology `name`."""
    chip, _ = chips.parse(name)
    sublayer, shape, others = CASES[case]
    mesh = sharding.make_mesh(devices=[device])
    with jax.set_mesh(mesh):
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=everywhere)

        def loss(x, w):
            return jnp.sum(jnp.square(sublayer(path, x, w).astype(jnp.float32)))

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        traced = step.trace(array(shape), {name: array(s) for name, s in others.items()})
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    issue = kernel_times.cycles(text, name)
    floor = {k: b / chip.hbm_bandwidth * chip.clock for k, b in hbm_bytes(text).items()}
    rest = schedule.read(text, chip, [(0,) * chip.dimensions], (1,) * chip.dimensions)
    return {
        "case": case,
        "path": path,
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
        f"{row['case']:8} {row['path']:7} {total / 1e6:8.2f} {adds:>8} "
        f"{row['kernel_cycles'] / 1e6:8.3f} {row['temp_mib']:9.0f}  {parts}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--paths", nargs="*", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    found = {"date": datetime.date.today().isoformat(), "topology": arguments.topology}
    found |= {"versions": versions, "rows": []}
    print("millions of cycles  total     adds  kernels  temp MiB  each kernel")
    with topology.opened(arguments.topology) as devices:
        for case in arguments.cases:
            base = None
            for path in arguments.paths:
                row = measure(case, path, arguments.topology, devices[0])
                if path == "none":
                    base = row["kernel_cycles"] + row["xla_cycles"]
                show(row, base)
                found["rows"].append(row)
                if arguments.json:  # after each row: the next may take minutes
                    text = json.dumps(found, indent=1) + "\n"
                    arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
