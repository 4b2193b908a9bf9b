"""Losses: arrays in, float32 out. Label −100 is ignored everywhere.

A loss over labels comes in two parts: `surprise` and `hits` per label, which the examples of a
batch give one by one, and `mean_over_labels` over all of them.
"""

import functools

import jax
import jax.numpy as jnp

from internvl_jax import ring as rings
from internvl_jax.sharding import laid_positions, replicate, spec

IGNORE = -100
_LANES = 128  # columns that a TPU register holds; slices of the vocabulary are multiples of it


def surprise(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """−log softmax(logits)[label], float32; anything where the label is −100.

    Args:
        logits: [..., C].
        labels: int [...], class index or −100.
        label_smoothing: ε; the target becomes (1 − ε)·one-hot + ε/C.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.where(labels != IGNORE, labels, 0)
    nll = -jnp.take_along_axis(logp, picked[..., None], axis=-1)[..., 0]
    if label_smoothing:
        nll = (1.0 - label_smoothing) * nll - label_smoothing * jnp.mean(logp, axis=-1)
    return nll


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1 where the largest logit is the label's, else 0, float32."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def mean_over_labels(
    values: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean of values [...] where the label is not −100; 0 when every label is.

    weights: [...], of each label in the mean; None: all alike.
    """
    kept = labels != IGNORE
    if weights is None:
        return jnp.sum(jnp.where(kept, values, 0.0)) / jnp.maximum(jnp.sum(kept), 1)
    weights = jnp.where(kept, weights.astype(jnp.float32), 0.0)
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Mean softmax cross-entropy over the labels that are not −100 (torch's conventions)."""
    return mean_over_labels(surprise(logits, labels, label_smoothing), labels, weights)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the labels that are not −100 which the largest logit hits."""
    return mean_over_labels(hits(logits, labels), labels)


def next_token(
    logits: jax.Array, labels: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Cross-entropy of position t's logits [B, T, V] with the label at t + 1 [B, T].

    weights: [B, T], of each label in the mean (InternVL 2.5 weighs answers by their length).
    """
    shifted = None if weights is None else weights[:, 1:]
    return cross_entropy(logits[:, :-1], labels[:, 1:], weights=shifted)


def vocabulary_slices(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array, slices: int
) -> tuple[jax.Array, jax.Array]:
    """`surprise` and `hits` of the logits hidden · kernel, which never exist as a whole.

    The vocabulary is worked through in slices, forward and, computing each slice again, backward.
    Each slice of the kernel is gathered once per pass and its gradient scattered once, as the whole
    kernel would be.

    Args:
        hidden: [B, T, W].
        kernel: [W, V], sharded on its width at most.
        labels: int [B, T], a token or −100; laid over the mesh like `hidden`.
        slices: in how many parts the vocabulary is cut.

    Returns:
        Two arrays float32 [B, T].
    """
    width, vocabulary = kernel.shape
    size = -(-vocabulary // (slices * _LANES)) * _LANES
    slices = -(-vocabulary // size)
    kernel = jnp.pad(kernel.astype(hidden.dtype), ((0, 0), (0, slices * size - vocabulary)))
    kernels = kernel.reshape(width, slices, size).transpose(1, 0, 2)
    dtype, out = hidden.dtype, spec("batch", laid_positions(hidden), None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(hidden: jax.Array, kernel: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
        logits = jnp.einsum("btd,dv->btv", hidden.astype(dtype), kernel, out_sharding=out)
        real = start + jnp.arange(size) < vocabulary
        logits = jnp.where(real, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        here = jnp.clip(labels - start, 0, size - 1)
        picked = jnp.take_along_axis(logits, here[..., None], axis=-1)[..., 0]
        picked = jnp.where(here == labels - start, picked, 0.0)
        largest, index = jnp.max(logits, axis=-1), start + jnp.argmax(logits, axis=-1)
        return jax.nn.logsumexp(logits, axis=-1), picked, jax.lax.stop_gradient(largest), index

    # In float32, so that the slices' gradients of the hidden states add up in it.
    hidden = hidden.astype(jnp.float32)
    starts = size * jnp.arange(slices)
    parts = jax.lax.scan(lambda _, part: (None, one(hidden, *part)), None, (kernels, starts))[1]
    total, picked, largest, index = parts  # each [slices, B, T]
    best = jnp.argmax(largest, axis=0)[None]
    guess = jnp.take_along_axis(index, best, axis=0)[0]
    nll = jax.nn.logsumexp(total, axis=0) - jnp.sum(picked, axis=0)
    return nll, (guess == labels).astype(jnp.float32)


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
    ring: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Symmetric CLIP loss over the global batch, ½[CE(S, diagonal) + CE(Sᵀ, diagonal)].

    Args:
        image, text: features [B, E], un-normalised.
        logit_scale: log of the inverse temperature.
        kept: bool [B]; rows that are not kept have no loss of their own but stay as negatives.
        label_smoothing: as in `surprise`.
        ring: never hold a device's rows of S, [B / devices, B], but pass the texts around
            (`ring.py`); for batches whose rows do not fit.

    Returns:
        The loss and the image-to-text top-1 accuracy within the batch.
    """
    labels = jnp.arange(image.shape[0], out_sharding=spec("batch"))
    if kept is not None:
        labels = jnp.where(kept, labels, IGNORE)
    if ring:
        return _ring_contrastive(image, text, logit_scale, labels, label_smoothing)
    per_image, per_text = similarities(image, text, logit_scale)
    i2t = cross_entropy(per_image, labels, label_smoothing)
    t2i = cross_entropy(per_text, labels, label_smoothing)
    return 0.5 * (i2t + t2i), accuracy(per_image, labels)


def _ring_contrastive(
    image: jax.Array,
    text: jax.Array,
    logit_scale: jax.Array,
    labels: jax.Array,
    label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
    """`contrastive` from log-sum-exps: of S, only these, the diagonal and row means count."""
    image = jnp.exp(logit_scale.astype(jnp.float32)) * unit(image)
    text = unit(text)
    rows, columns, largest = rings.log_sum_exps(image, text)
    diagonal = jnp.sum(image * text, axis=-1)
    nll = 0.5 * (rows + columns) - diagonal
    if label_smoothing:
        # The mean of a row of S is a product with the mean text, and likewise for columns.
        mean = jnp.sum(image * jnp.mean(text, axis=0), -1)
        mean = 0.5 * (mean + jnp.sum(text * jnp.mean(image, axis=0), -1))
        nll = nll + label_smoothing * (diagonal - mean)
    correct = (largest == labels).astype(jnp.float32)
    return mean_over_labels(nll, labels), mean_over_labels(correct, labels)


def hardest_texts(
    image: jax.Array, text: jax.Array, identities: tuple[jax.Array, ...], usable: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each image of the global batch the most similar text that does not belong to it.

    Args:
        image, text: features [B, E], un-normalised.
        identities: arrays [B]; a text that shares any of them with the image's own belongs to it.
        usable: bool [B], texts to choose from.

    Returns:
        int32 [B], the text's number; bool [B], whether there is any.
    """
    out = spec("batch", None)
    similarity = jnp.einsum("id,jd->ij", unit(image), replicate(unit(text)), out_sharding=out)
    allowed = replicate(usable)[None, :]
    for identity in identities:
        allowed = allowed & (identity[:, None] != replicate(identity)[None, :])
    similarity = jnp.where(allowed, similarity, -jnp.inf)
    return jnp.argmax(similarity, axis=1), jnp.any(allowed, axis=1)


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
