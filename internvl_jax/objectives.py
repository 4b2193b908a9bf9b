"""What each stage optimises: (model, batch, key) → (loss, metrics).

The only file that knows the stages. Nothing here freezes anything: which parameters move is a
partition of the parameter tree, made before the gradient is taken. Batches hold uint8 images and
int32 ids right-padded with 0; a metric is a float32 scalar.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from internvl_jax import losses
from internvl_jax.kernels import ITC, ITG, ITM, Keys, Middleware
from internvl_jax.sharding import spec

Batch = Mapping[str, jax.Array]
Result = tuple[jax.Array, dict[str, jax.Array]]


def language(model: Any, batch: Batch, *, key: jax.Array | None = None) -> Result:
    """Stage 0: next-token prediction on text alone. Batch: tokens [B, L]."""
    tokens = batch["tokens"]
    labels = jnp.where(tokens > 0, tokens, losses.IGNORE)
    logits = model(tokens)
    loss = losses.next_token(logits, labels)
    return loss, {"loss": loss, "token_accuracy": losses.accuracy(logits[:, :-1], labels[:, 1:])}


def contrastive(
    model: Any, batch: Batch, *, key: jax.Array | None = None, mask_ratio: float = 0.0
) -> Result:
    """Stage 1: symmetric cross-entropy over the similarities of the global batch (paper §3.3).

    Batch: image [B, H, W, 3], text [B, L] ("summarize:" + caption). `mask_ratio` of the image
    tokens is removed from the sequence (FLIP; appendix A.3: 0.5 at 196 px, then 0 at 224 px).
    """
    vision = model.vision(batch["image"], mask_ratio=mask_ratio, key=key)
    image = model.image_features(vision, "c")
    text = model.encode_text(batch["text"])
    loss, accuracy = losses.contrastive(image, text, model.logit_scale[...])
    return loss, {
        "loss": loss,
        "contrastive_accuracy": accuracy,
        "logit_scale": model.logit_scale[...],
    }


def _grouped_rows(groups: list[jax.Array]) -> jax.Array:
    """Lay text groups [B, L] side by side as rows [B·r, L], an image's rows together.

    Image-major order keeps a row on the device that holds its image.
    """
    batch, length = groups[0].shape
    stacked = jnp.stack(groups, axis=1)
    return jnp.reshape(
        stacked, (batch * len(groups), length), out_sharding=spec("batch", None)
    )


def _middleware_groups(
    model: Any, vision: jax.Array, groups: list[jax.Array], modes: list[int]
) -> tuple[jax.Array, jax.Array]:
    """One pass of QLLaMA over [queries | text] for several text groups of each image.

    Args:
        vision: [B, N, D].
        groups: r arrays of ids [B, L]; modes: the attention mode of each.

    Returns:
        Query states [B, r, Q, W] and text states [B, r, L, W].
    """
    ids = _grouped_rows(groups)
    rows, batch, count = ids.shape[0], vision.shape[0], len(groups)
    queries = model.query_embeddings(rows)
    x = jnp.concatenate([queries, model.llama.embed_tokens(ids)], axis=1)
    mode = jnp.broadcast_to(
        jnp.asarray(modes, jnp.int32), (batch, count), out_sharding=spec("batch", None)
    )
    mode = jnp.reshape(mode, (rows,), out_sharding=spec("batch"))
    valid = jnp.concatenate([jnp.ones_like(queries[..., 0], bool), ids > 0], axis=1)
    size = model.config.num_queries
    hidden = model.middleware(x, vision, mask=Middleware(size, mode) & Keys(valid))[0]
    shape = (batch, count, *hidden.shape[1:])
    hidden = jnp.reshape(hidden, shape, out_sharding=spec("batch", None, None, None))
    return hidden[:, :, :size], hidden[:, :, size:]


def generative(
    model: Any,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    label_smoothing: float = 0.0,
    empty_caption_tokens: int = 2,
    empty_text_tokens: int = 5,
) -> Result:
    """Stage 2: matching + contrastive + captioning, unweighted, in one pass of the middleware.

    The vision tower runs once; three text groups share its keys and values (spec of the released
    forward; paper §3.3). ITM: the first B − ⌊B/2⌋ images get their negative caption, the others
    their own. Captions that are empty (so many tokens, as the release detects them) are left out of
    ITM and ITC.

    Batch: image; positive, negative, text, caption [B, L]; caption_labels [B, L].
    """
    vision = model.vision(batch["image"], key=key)
    size = batch["image"].shape[0]
    negatives = size - size // 2
    is_positive = jnp.arange(size, out_sharding=spec("batch")) >= negatives
    matching = jnp.where(is_positive[:, None], batch["positive"], batch["negative"])
    groups = [matching, batch["text"], batch["caption"]]
    queries, texts = _middleware_groups(model, vision, groups, [ITM, ITC, ITG])

    match_labels = jnp.where(
        jnp.sum(matching > 0, axis=1) == empty_caption_tokens,
        losses.IGNORE,
        is_positive.astype(jnp.int32),
    )
    match_logits = model.match_logits(queries[:, 0])
    itm = losses.cross_entropy(match_logits, match_labels)

    valid = batch["text"] > 0
    image_features = model.pool2(queries[:, 1])
    text_features = model.project_text(texts[:, 1], valid)
    itc, itc_accuracy = losses.contrastive(
        image_features,
        text_features,
        model.logit_scale[...],
        kept=jnp.sum(valid, axis=1) != empty_text_tokens,
        label_smoothing=label_smoothing,
    )

    caption_logits = model.llama.logits(texts[:, 2])
    itg = losses.next_token(caption_logits, batch["caption_labels"])
    loss = itm + itc + itg
    return loss, {
        "loss": loss,
        "itm": itm,
        "itc": itc,
        "itg": itg,
        "match_accuracy": losses.accuracy(match_logits, match_labels),
        "contrastive_accuracy": itc_accuracy,
        "token_accuracy": losses.accuracy(
            caption_logits[:, :-1], batch["caption_labels"][:, 1:]
        ),
        "logit_scale": model.logit_scale[...],
    }


def retrieval(model: Any, batch: Batch, *, key: jax.Array | None = None) -> Result:
    """Retrieval fine-tuning: matching with both captions, multi-positive contrast with C and G.

    Batch: image, positive, negative, text, image_id [B] (captions of one image share it).
    """
    vision = model.vision(batch["image"], key=key)
    groups = [batch["negative"], batch["positive"], batch["text"]]
    queries, texts = _middleware_groups(model, vision, groups, [ITM, ITM, ITC])
    size = batch["image"].shape[0]

    match_logits = model.match_logits(
        jnp.reshape(
            queries[:, :2],
            (2 * size, *queries.shape[2:]),
            out_sharding=spec("batch", None, None),
        )
    )
    match_labels = jnp.broadcast_to(jnp.arange(2), (size, 2), out_sharding=spec("batch", None))
    match_labels = jnp.reshape(match_labels, (2 * size,), out_sharding=spec("batch"))
    itm = losses.cross_entropy(match_logits, match_labels)

    text_features = model.project_text(texts[:, 2], batch["text"] > 0)
    scale, identity = model.logit_scale[...], batch["image_id"]
    itc_g = losses.multi_positive(model.pool2(queries[:, 2]), text_features, scale, identity)
    itc_c = losses.multi_positive(model.pool(vision), text_features, scale, identity)
    loss = itm + itc_g + itc_c
    return loss, {
        "loss": loss,
        "itm": itm,
        "itc": itc_g + itc_c,
        "match_accuracy": losses.accuracy(match_logits, match_labels),
        "logit_scale": scale,
    }


def instruct(model: Any, batch: Batch, *, key: jax.Array | None = None) -> Result:
    """Stage 3: next-token prediction on assistant text only.

    Batch: image [B, M, H, W, 3], tokens [B, L] with image positions, labels [B, L].
    """
    logits = model(batch["tokens"], batch["image"])
    loss = losses.next_token(logits, batch["labels"])
    accuracy = losses.accuracy(logits[:, :-1], batch["labels"][:, 1:])
    return loss, {"loss": loss, "token_accuracy": accuracy}


OBJECTIVES: dict[str, Callable[..., Result]] = {
    "language": language,
    "contrastive": contrastive,
    "generative": generative,
    "retrieval": retrieval,
    "instruct": instruct,
}
