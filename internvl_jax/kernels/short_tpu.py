"""Attention over all keys of a sequence at once: Pallas TPU kernels, forward and backward.

A grid step holds one sequence's rows of a group of heads, which are lane slices of [B, T, H·D]:
nothing is padded, transposed or reshaped in HBM. What happens in a step stands in
`short_kernels_tpu`.

Heads are 128 wide, a vector register's lanes. A narrower one would start in the middle of a
register, so that each load and store would shift; XLA serves those.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from internvl_jax.kernels import vmem
from internvl_jax.kernels.masks import QUERY, ROW, Full, Mask
from internvl_jax.kernels.short_kernels_tpu import (
    LANES,
    STAGES,
    Sizes,
    backward_kernel,
    forward_kernel,
    packed,
    summed,
)

LONGEST = 1152  # keys: the code of a tile is unrolled over them


def supports(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str | None:
    """None, or why this kernel cannot run."""
    dim, dtypes = query.shape[3], {a.dtype for a in (query, key, value)}
    if dim != LANES:
        return f"the short kernel takes a head_dim of {LANES}, not {dim}"
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"the short kernel takes bfloat16 or float32 throughout, not {dtypes}"
    if key.shape[1] > LONGEST:
        return f"the short kernel takes at most {LONGEST} keys, not {key.shape[1]}"
    if _sizes(query, key, mask) is None:
        return f"one head of {query.shape[1]} × {key.shape[1]} positions outgrows VMEM"
    return None


def _sizes(query, key, mask, scale=1.0, interpret=False) -> Sizes | None:
    """As many heads in a step as VMEM holds; None if not even one."""
    _, queries, heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    masked = not isinstance(mask, Full)
    for group in range(key_heads, 0, -1):
        if key_heads % group == 0:
            sizes = Sizes(queries, keys, heads, key_heads, group, masked, scale, interpret)
            # A quarter is left to what the compiler keeps there around the kernel.
            if sizes.memory(query.dtype.itemsize) <= vmem.available() * 3 // 4:
                return sizes
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask,
    scale: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Scaled dot-product attention, [B, T, H, D]; see `kernels.attention.attention`."""
    scale = LANES**-0.5 if scale is None else scale
    sizes = _sizes(query, key, mask, scale, interpret)
    # Booleans have no place in a kernel's memory; numbers do.
    mask = jax.tree.map(lambda a: a.astype(jnp.int32), mask)
    mixed = _attend(sizes, *(a.reshape(*a.shape[:2], -1) for a in (query, key, value)), mask)
    return mixed.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sizes, query, key, value, mask):
    """[B, T, H·D], [B, S, K·D] twice → [B, T, H·D]."""
    return _forward(sizes, query, key, value, mask)[0]


def _save(sizes, query, key, value, mask):
    kept = _forward(sizes, query, key, value, mask)
    mixed, log_sums = (checkpoint_name(a, "attention") for a in kept)
    return mixed, (query, key, value, mask, log_sums)


def _pull(sizes, saved, gradient):
    query, key, value, mask, log_sums = saved
    return *_backward(sizes, query, key, value, mask, log_sums, gradient), None


_attend.defvjp(_save, _pull)


def _call(sizes: Sizes, kernel, mask: Mask, arrays, inputs, outputs, out_shape, scratch, name):
    """Run `kernel` over (sequence, group of heads)."""
    scalars, vectors = [], []
    for array, along in zip(jax.tree.leaves(mask), mask.along, strict=True):
        if along == ROW:
            scalars.append(array)
        else:
            over = sizes.rows - array.shape[1] if along == QUERY else 0
            vectors.append(jnp.pad(array, ((0, 0), (0, over)))[:, None])
    bias = [pltpu.VMEM((sizes.keys, sizes.rows), jnp.float32)] if sizes.masked else []
    return pl.pallas_call(
        functools.partial(kernel, sizes, mask),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(arrays[0].shape[0], sizes.key_heads // sizes.group),
            in_specs=[
                *(pl.BlockSpec((None, 1, v.shape[2]), lambda b, *_: (b, 0, 0)) for v in vectors),
                *inputs,
            ],
            out_specs=outputs,
            scratch_shapes=[*scratch, *bias],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=sizes.memory(arrays[0].dtype.itemsize),
        ),
        interpret=sizes.interpret,
        name=name,
    )(*scalars, *vectors, *arrays)


def _specs(sizes: Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, of keys and of log-sums, [B, H, 1, T]."""
    heads = sizes.group * sizes.repeat
    return (
        pl.BlockSpec((None, sizes.rows, heads * LANES), lambda b, g, *_: (b, 0, g)),
        pl.BlockSpec((None, sizes.keys, sizes.group * LANES), lambda b, g, *_: (b, 0, g)),
        pl.BlockSpec((None, heads, 1, sizes.rows), lambda b, g, *_: (b, g, 0, 0)),
    )


def _forward(sizes: Sizes, query, key, value, mask):
    queries, keys, log_sums = _specs(sizes)
    shape = (query.shape[0], sizes.heads, 1, sizes.rows)
    return _call(
        sizes,
        forward_kernel,
        mask,
        (query, key, value),
        [queries, keys, keys],
        [queries, log_sums],
        [
            jax.ShapeDtypeStruct(query.shape, value.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        [
            pltpu.VMEM((STAGES, sizes.keys, sizes.tile), jnp.float32),
            packed(sizes, value.dtype),
            pltpu.VMEM((STAGES, 8, sizes.tile), jnp.float32),
        ],
        "attention_short_forward",
    )


def _backward(sizes: Sizes, query, key, value, mask, log_sums, gradient):
    queries, keys, rows = _specs(sizes)
    whole = (STAGES, sizes.keys, sizes.tile)
    sums = [pltpu.VMEM((2, sizes.keys, LANES), jnp.float32)] if summed(sizes) else []
    return _call(
        sizes,
        backward_kernel,
        mask,
        (query, key, value, gradient, log_sums),
        [queries, keys, keys, queries, rows],
        [queries, keys, keys],
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (query, key, value)],
        [
            *[pltpu.VMEM(whole, jnp.float32)] * 2,
            *[packed(sizes, query.dtype)] * 2,
            *sums,
        ],
        "attention_short_backward",
    )
