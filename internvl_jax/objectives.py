"""What each stage optimises. The only file that knows the stages.

Nothing here freezes anything: which parameters move is a partition of the parameter tree, made
before the gradient is taken. Batches hold uint8 images and int32 ids right-padded with 0; a metric
is a float32 scalar.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import losses
from internvl_jax.kernels import ITC, ITG, ITM, Keys, Middleware
from internvl_jax.models.chat import IMAGE_TOKEN
from internvl_jax.sharding import positions_axis, replicate, reshard, spec

Batch = Mapping[str, jax.Array]
Outputs = dict[str, jax.Array]
Result = tuple[jax.Array, dict[str, jax.Array]]


class Objective:
    """A loss in the parts that let a step work through its batch in chunks (`train.gradients`).

    prepare: what depends on an example's place in the whole batch, as further fields of the batch.
    outputs: float32 arrays [B, …] of any part of a batch, example by example.
    loss: loss and metrics of the outputs of the whole batch.
    features: those outputs alone in which the loss is not linear, at the least cost; in every other
      output it must be linear.
    vision: the vision tokens [B, N, D] that features and outputs start from, where both do: those
      of the batch under "vision" if it has them, else the tower's.
    separate: names of outputs, in groups that share no layer; () if all come from the same layers.
    mine: fields of the batch that are chosen by the features of the whole batch, without a
      gradient; only where `mines` says that there are any.

    `keys` [B] holds one key per example; without keys nothing is random.
    """

    mines = False
    separate: tuple[tuple[str, ...], ...] = ()

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def mine(self, features: Outputs, batch: Batch) -> Batch:
        return batch

    def vision(self, model: Any, batch: Batch, keys: jax.Array | None) -> jax.Array | None:
        return None

    def features(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        return {}

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        raise NotImplementedError

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        raise NotImplementedError

    def __call__(self, model: Any, batch: Batch, keys: jax.Array | None = None) -> Result:
        """Loss and metrics of a whole batch in one pass."""
        batch = self.prepare(batch)
        if self.mines:
            features = jax.lax.stop_gradient(self.features(model, batch, keys))
            batch = self.mine(features, batch)
        return self.loss(model, self.outputs(model, batch, keys), batch)


def _next_tokens(
    llama: Any, hidden: jax.Array, labels: jax.Array, slices: int
) -> tuple[jax.Array, jax.Array]:
    """Surprise and hits of the states at t [B, T, W] about the labels at t + 1: [B, T − 1]."""
    labels = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=losses.IGNORE)
    positions = positions_axis(labels.shape[1])  # each device takes its own to the vocabulary
    hidden = reshard(hidden, "batch", positions, None)
    labels = reshard(labels, "batch", positions)
    if slices > 1:
        found = losses.vocabulary_slices(hidden, llama.head_kernel(), labels, slices)
    else:
        logits = llama.logits(hidden)
        found = losses.surprise(logits, labels), losses.hits(logits, labels)
    nll, hit = (reshard(x, "batch", None)[:, :-1] for x in found)
    return nll, hit


@dataclasses.dataclass(frozen=True)
class Language(Objective):
    """Stage 0: next-token prediction on text alone. Batch: tokens [B, L].

    vocabulary_slices: see `losses.vocabulary_slices`; 1 makes the logits as a whole.
    """

    vocabulary_slices: int = 1

    def prepare(self, batch: Batch) -> Batch:
        tokens = batch["tokens"]
        return {**batch, "labels": jnp.where(tokens > 0, tokens, losses.IGNORE)}

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        hidden = model.hidden(batch["tokens"])
        nll, hit = _next_tokens(model.llama, hidden, batch["labels"], self.vocabulary_slices)
        return {"token_nll": nll, "token_hit": hit}

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        labels = batch["labels"][:, 1:]
        loss = losses.mean_over_labels(outputs["token_nll"], labels)
        accuracy = losses.mean_over_labels(outputs["token_hit"], labels)
        return loss, {"loss": loss, "token_accuracy": accuracy}


@dataclasses.dataclass(frozen=True)
class Instruct(Language):
    """Stage 3: next-token prediction on assistant text only.

    Batch: image [B, M, H, W, 3], tokens [B, L] with image positions, labels [B, L]; in packed
    batches also segments [B, L] (`Chat.hidden`).

    Metrics count what the batch really holds, without padding: tokens, and images (squares).
    """

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        segments = batch.get("segments")
        hidden = model.hidden(batch["tokens"], batch["image"], segments=segments)
        nll, hit = _next_tokens(model.llm, hidden, batch["labels"], self.vocabulary_slices)
        return {"token_nll": nll, "token_hit": hit}

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        loss, metrics = super().loss(model, outputs, batch)
        tokens = batch["tokens"]
        squares = jnp.sum(tokens == IMAGE_TOKEN) / model.config.tokens_per_image
        metrics |= {"tokens": jnp.sum(tokens != 0).astype(jnp.float32), "images": squares}
        if "segments" in batch:
            each = jnp.max(batch["segments"], axis=1)
            metrics["conversations"] = jnp.sum(each).astype(jnp.float32)
        return loss, metrics


def _vision(
    model: Any, batch: Batch, keys: jax.Array | None, mask_ratio: float = 0.0
) -> jax.Array:
    if "vision" in batch:
        return batch["vision"]
    return model.vision(batch["image"], mask_ratio=mask_ratio, keys=keys)


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Stage 1: symmetric cross-entropy over the similarities of the global batch (paper §3.3).

    Batch: image [B, H, W, 3], text [B, L] ("summarize:" + caption).

    mask_ratio: share of the image tokens removed from the sequence (FLIP; appendix A.3: 0.5 at
      196 px, then 0 at 224 px).
    ring: never hold the matrix of similarities (`losses.contrastive`).
    """

    separate = (("image",), ("text",))

    mask_ratio: float = 0.0
    ring: bool = False

    def vision(self, model: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        return _vision(model, batch, keys, self.mask_ratio)

    def features(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        image = model.image_features(self.vision(model, batch, keys), "c")
        return {"image": image, "text": model.encode_text(batch["text"])}

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        return self.features(model, batch, keys)

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        scale = model.logit_scale[...]
        loss, accuracy = losses.contrastive(
            outputs["image"], outputs["text"], scale, ring=self.ring
        )
        return loss, {"loss": loss, "contrastive_accuracy": accuracy, "logit_scale": scale}


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


@dataclasses.dataclass(frozen=True)
class Generative(Objective):
    """Stage 2: matching + contrastive + captioning, unweighted, in one pass of the middleware.

    The vision tower runs once; three text groups share its keys and values (spec of the released
    forward; paper §3.3). ITM: the first B − ⌊B/2⌋ images get their negative caption, the others
    their own. Captions that are empty (so many tokens, as the release detects them) are left out of
    ITM and ITC.

    Batch: image; positive, negative, text, caption [B, L]; caption_labels [B, L]; image_id [B].

    itm_negatives: "random" takes the negative of the batch, as released; "hardest" the caption of
      another image of the global batch whose text is nearest to the image by ITC (BLIP-2 draws one
      by these similarities). Never that of the same image, one that reads alike, or an empty one;
      where none is left, the negative of the batch. Costs one more pass over images and texts,
      which a step in chunks makes anyway.
    label_smoothing: of ITC. ring: as in `Contrastive`. vocabulary_slices: as in `Language`.
    """

    label_smoothing: float = 0.0
    empty_caption_tokens: int = 2
    empty_text_tokens: int = 5
    ring: bool = False
    vocabulary_slices: int = 1
    itm_negatives: str = "random"

    def __post_init__(self) -> None:
        if self.itm_negatives not in ("random", "hardest"):
            raise ValueError(
                f'itm_negatives must be "random" or "hardest", not {self.itm_negatives!r}'
            )

    @property
    def mines(self) -> bool:
        return self.itm_negatives == "hardest"

    def mine(self, features: Outputs, batch: Batch) -> Batch:
        captions = batch["positive"]
        usable = jnp.sum(captions > 0, axis=1) != self.empty_caption_tokens
        words = captions.astype(jnp.uint32) * _odd_numbers(captions.shape[1])
        identities = batch["image_id"], jnp.sum(words, axis=1)
        hardest, found = losses.hardest_texts(
            features["image"], features["text"], identities, usable
        )
        mined = replicate(captions).at[hardest].get(out_sharding=spec("batch", None))
        negative = jnp.where(found[:, None], mined, batch["negative"])
        return self.prepare({**batch, "negative": negative})

    def prepare(self, batch: Batch) -> Batch:
        size = batch["image"].shape[0]
        negatives = size - size // 2
        is_positive = jnp.arange(size, out_sharding=spec("batch")) >= negatives
        matching = jnp.where(is_positive[:, None], batch["positive"], batch["negative"])
        match_labels = jnp.where(
            jnp.sum(matching > 0, axis=1) == self.empty_caption_tokens,
            losses.IGNORE,
            is_positive.astype(jnp.int32),
        )
        return {**batch, "matching": matching, "match_labels": match_labels}

    def vision(self, model: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        return _vision(model, batch, keys)

    def features(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        vision = self.vision(model, batch, keys)
        queries, texts = _middleware_groups(model, vision, [batch["text"]], [ITC])
        return self._features(model, batch, queries[:, 0], texts[:, 0])

    def _features(
        self, model: Any, batch: Batch, queries: jax.Array, text: jax.Array
    ) -> Outputs:
        image = model.pool2(queries)
        return {"image": image, "text": model.project_text(text, batch["text"] > 0)}

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        vision = self.vision(model, batch, keys)
        groups = [batch["matching"], batch["text"], batch["caption"]]
        queries, texts = _middleware_groups(model, vision, groups, [ITM, ITC, ITG])
        match_logits = model.match_logits(queries[:, 0])
        labels = batch["caption_labels"]
        nll, hit = _next_tokens(model.llama, texts[:, 2], labels, self.vocabulary_slices)
        return {
            **self._features(model, batch, queries[:, 1], texts[:, 1]),
            "match_nll": losses.surprise(match_logits, batch["match_labels"]),
            "match_hit": losses.hits(match_logits, batch["match_labels"]),
            "token_nll": nll,
            "token_hit": hit,
        }

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        scale = model.logit_scale[...]
        itm = losses.mean_over_labels(outputs["match_nll"], batch["match_labels"])
        itc, itc_accuracy = losses.contrastive(
            outputs["image"],
            outputs["text"],
            scale,
            kept=jnp.sum(batch["text"] > 0, axis=1) != self.empty_text_tokens,
            label_smoothing=self.label_smoothing,
            ring=self.ring,
        )
        labels = batch["caption_labels"][:, 1:]
        itg = losses.mean_over_labels(outputs["token_nll"], labels)
        loss = itm + itc + itg
        return loss, {
            "loss": loss,
            "itm": itm,
            "itc": itc,
            "itg": itg,
            "match_accuracy": losses.mean_over_labels(outputs["match_hit"], batch["match_labels"]),
            "contrastive_accuracy": itc_accuracy,
            "token_accuracy": losses.mean_over_labels(outputs["token_hit"], labels),
            "logit_scale": scale,
        }


def _odd_numbers(count: int) -> np.ndarray:
    """Multipliers under which the sums of two rows of ids hardly ever meet, uint32."""
    return np.random.default_rng(0).integers(0, 1 << 31, count, np.uint32) * 2 + 1


@dataclasses.dataclass(frozen=True)
class Retrieval(Objective):
    """Retrieval fine-tuning: matching with both captions, multi-positive contrast with C and G.

    Batch: image, positive, negative, text, image_id [B] (captions of one image share it).
    """

    def vision(self, model: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        return _vision(model, batch, keys)

    def features(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        vision = self.vision(model, batch, keys)
        queries, texts = _middleware_groups(model, vision, [batch["text"]], [ITC])
        return self._features(model, batch, vision, queries[:, 0], texts[:, 0])

    def _features(
        self, model: Any, batch: Batch, vision: jax.Array, queries: jax.Array, text: jax.Array
    ) -> Outputs:
        return {
            "image_c": model.pool(vision),
            "image_g": model.pool2(queries),
            "text": model.project_text(text, batch["text"] > 0),
        }

    def outputs(self, model: Any, batch: Batch, keys: jax.Array | None) -> Outputs:
        vision = self.vision(model, batch, keys)
        groups = [batch["negative"], batch["positive"], batch["text"]]
        queries, texts = _middleware_groups(model, vision, groups, [ITM, ITM, ITC])
        size = batch["image"].shape[0]
        wide = spec("batch", None, None)
        matched = jnp.reshape(queries[:, :2], (2 * size, *queries.shape[2:]), out_sharding=wide)
        match_logits = jnp.reshape(model.match_logits(matched), (size, 2, 2), out_sharding=wide)
        labels = jnp.broadcast_to(jnp.arange(2), (size, 2), out_sharding=spec("batch", None))
        return {
            **self._features(model, batch, vision, queries[:, 2], texts[:, 2]),
            "match_nll": losses.surprise(match_logits, labels),  # [B, 2]
            "match_hit": losses.hits(match_logits, labels),
        }

    def loss(self, model: Any, outputs: Outputs, batch: Batch) -> Result:
        scale, identity = model.logit_scale[...], batch["image_id"]
        itm = jnp.mean(outputs["match_nll"])
        itc_g = losses.multi_positive(outputs["image_g"], outputs["text"], scale, identity)
        itc_c = losses.multi_positive(outputs["image_c"], outputs["text"], scale, identity)
        loss = itm + itc_g + itc_c
        return loss, {
            "loss": loss,
            "itm": itm,
            "itc": itc_g + itc_c,
            "match_accuracy": jnp.mean(outputs["match_hit"]),
            "logit_scale": scale,
        }


OBJECTIVES: dict[str, type[Objective]] = {
    "language": Language,
    "contrastive": Contrastive,
    "generative": Generative,
    "retrieval": Retrieval,
    "instruct": Instruct,
}
