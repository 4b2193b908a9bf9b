"""Losses: arrays in, float32 scalars out. Label −100 is ignored everywhere."""

import jax
import jax.numpy as jnp

from internvl_jax.sharding import replicate, spec

IGNORE = -100


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Mean softmax cross-entropy over the labels that are not −100 (torch's conventions).

    Args:
        logits: [..., C].
        labels: int [...], class index or −100.
        label_smoothing: ε; the target becomes (1 − ε)·one-hot + ε/C.

    Returns:
        Scalar; 0 when every label is ignored.
    """
    kept = labels != IGNORE
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.where(kept, labels, 0)
    nll = -jnp.take_along_axis(logp, picked[..., None], axis=-1)[..., 0]
    if label_smoothing:
        nll = (1.0 - label_smoothing) * nll - label_smoothing * jnp.mean(logp, axis=-1)
    return jnp.sum(jnp.where(kept, nll, 0.0)) / jnp.maximum(jnp.sum(kept), 1)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the labels that are not −100 which the largest logit hits."""
    kept = labels != IGNORE
    hits = (jnp.argmax(logits, axis=-1) == labels) & kept
    return jnp.sum(hits, dtype=jnp.float32) / jnp.maximum(jnp.sum(kept), 1)


def next_token(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of position t's logits [B, T, V] with the label at t + 1 [B, T]."""
    return cross_entropy(logits[:, :-1], labels[:, 1:])


def unit(x: jax.Array) -> jax.Array:
    """Rows of length one, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def similarities(
    image: jax.Array, text: jax.Array, logit_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Image-to-text and text-to-image logits over the global batch, each [B, B].

    Features [B, E] are normalised here. Each side is gathered once; rows stay sharded over the
    batch, so no device holds more than its rows of either matrix (the plain form).
    """
    image, text = unit(image), unit(text)
    out = spec("batch", None)
    scale = jnp.exp(logit_scale.astype(jnp.float32))
    per_image = jnp.einsum("id,jd->ij", image, replicate(text), out_sharding=out)
    per_text = jnp.einsum("id,jd->ij", text, replicate(image), out_sharding=out)
    return scale * per_image, scale * per_text


def contrastive(
    image: jax.Array,
    text: jax.Array,
    logit_scale: jax.Array,
    *,
    kept: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Symmetric CLIP loss over the global batch, ½[CE(S, diagonal) + CE(Sᵀ, diagonal)].

    Args:
        image, text: features [B, E], un-normalised.
        logit_scale: log of the inverse temperature.
        kept: bool [B]; rows that are not kept have no loss of their own but stay as negatives.
        label_smoothing: as in `cross_entropy`.

    Returns:
        The loss and the image-to-text top-1 accuracy within the batch.
    """
    per_image, per_text = similarities(image, text, logit_scale)
    labels = jnp.arange(image.shape[0], out_sharding=spec("batch"))
    if kept is not None:
        labels = jnp.where(kept, labels, IGNORE)
    i2t = cross_entropy(per_image, labels, label_smoothing)
    t2i = cross_entropy(per_text, labels, label_smoothing)
    return 0.5 * (i2t + t2i), accuracy(per_image, labels)


def multi_positive(
    image: jax.Array, text: jax.Array, logit_scale: jax.Array, identity: jax.Array
) -> jax.Array:
    """Contrastive loss whose targets are shared by all captions of the same image.

    T_ij = 1[identity_i = identity_j] / row sum, soft-target cross-entropy both ways (the released
    retrieval fine-tuning).
    """
    per_image, per_text = similarities(image, text, logit_scale)
    same = identity[:, None] == replicate(identity)[None, :]
    targets = same / jnp.sum(same, axis=1, keepdims=True)

    def soft(logits: jax.Array) -> jax.Array:
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1))

    return 0.5 * (soft(per_image) + soft(per_text))
