"""The one attention function of the project, and the choice of what runs it."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from internvl_jax.kernels import cudnn, pallas_tpu, reference, xla
from internvl_jax.kernels.masks import Full, Mask
from internvl_jax.sharding import platform

FULL = Full()
log = logging.getLogger(__name__)


class Implementation(NamedTuple):
    """What computes attention, and where.

    Attributes:
        attention: (query, key, value, *, mask, scale) → [B, T, H, D].
        supports: (query, key, value, mask) → None, or why it cannot run.
        platforms: where it runs natively; empty for everywhere.
        supports_unasked: the guard where it is not asked for by name, if stricter.
    """

    attention: Callable[..., jax.Array]
    supports: Callable[..., str | None]
    platforms: tuple[str, ...] = ()
    supports_unasked: Callable[..., str | None] | None = None


IMPLEMENTATIONS = {  # in the order of preference
    "pallas_tpu": Implementation(
        pallas_tpu.attention, pallas_tpu.supports, ("tpu",), pallas_tpu.supports_unasked
    ),
    "cudnn": Implementation(cudnn.attention, cudnn.supports, ("gpu", "cuda")),
    "xla": Implementation(xla.attention, xla.supports),
    "reference": Implementation(reference.attention, reference.supports),
}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Mask = FULL,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Scaled dot-product attention with grouped queries and computed masks.

    Args:
        query: [B, T, H, D].
        key, value: [B, S, K, D], K dividing H.
        mask: what each query sees (`kernels.masks`); a row that sees nothing gives zeros.
        scale: multiplies the scores; 1/sqrt(D) by default.
        implementation: a name of `IMPLEMENTATIONS`; None takes the first that can run here.
            "pallas_tpu" by name also runs on a CPU, interpreted (slowly).

    Returns:
        [B, T, H, D] in the dtype of `value`; scores and softmax are float32. It bears the name
        "attention" for a policy of rematerialisation, as does all that a kernel's backward reads.

    Raises:
        ValueError: unknown implementation, one that cannot run (with the reason), or head counts
            that do not divide.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} query heads do not divide over {key.shape[2]} key heads"
        )
    if implementation is None:
        chosen = choose(query, key, value, mask)
    else:
        chosen = implementation
        if chosen not in IMPLEMENTATIONS:
            names = list(IMPLEMENTATIONS)
            raise ValueError(f"attention implementation {chosen!r}: choose from {names}")
        reason = IMPLEMENTATIONS[chosen].supports(query, key, value, mask)
        if reason is not None:
            raise ValueError(f"attention implementation {chosen!r} cannot run here: {reason}")
    mixed = IMPLEMENTATIONS[chosen].attention(query, key, value, mask=mask, scale=scale)
    # The kernels name theirs: a second name would be a second thing to keep.
    return mixed if chosen == "pallas_tpu" else checkpoint_name(mixed, "attention")


_PLAIN = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Attention that is traced within, if it names no implementation, consists of the products of
    its formula, whatever would run it here: so that they can be counted."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether this is within `plain`."""
    return _PLAIN.get()


def choose(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> str:
    """The first implementation of this platform whose guard accepts; says so once."""
    if is_plain():
        return "xla"
    here, reasons = platform(), []
    for name, entry in IMPLEMENTATIONS.items():
        if entry.platforms and here not in entry.platforms:
            continue
        reason = (entry.supports_unasked or entry.supports)(query, key, value, mask)
        if reason is None:
            shape = f"{query.shape[1]} × {key.shape[1]} positions, {query.shape[3]} wide"
            _say_once(name, here, shape, "; ".join(reasons))
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no attention implementation runs here: {'; '.join(reasons)}")


@functools.cache
def _say_once(name: str, here: str, shape: str, reasons: str) -> None:
    because = f" ({reasons})" if reasons else ""
    log.info("attention on %s, %s: %s%s", here, shape, name, because)
