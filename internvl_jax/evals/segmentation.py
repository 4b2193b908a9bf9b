"""Semantic segmentation with heads on the vision tower; mIoU of sliding windows (paper Table 5)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from internvl_jax.data import scenes
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import features, scores
from internvl_jax.evals import segmentation_heads as heads
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.evals.segmentation_data import IGNORED, ade20k, crop_of, scene_set
from internvl_jax.evals.segmentation_recipe import Recipe, optimizer
from internvl_jax.models import ModelConfig, bind
from internvl_jax.sharding import place_batch, replicate

HEADS = ("linear", "upernet")
_AID = 0.4  # weight of the auxiliary head's loss


def maps_of(
    config: ModelConfig,
    params: Any,
    pixels: jax.Array,
    layers: tuple[int, ...],
    keys: jax.Array | None = None,
) -> list[jax.Array]:
    """Patch tokens after the blocks `layers`, without the class token: a list of [B, H, W, D]."""
    _, states = bind(config, params).vit(pixels, hidden_states=True, keys=keys)
    patch = config.vit.patch_size
    shape = (pixels.shape[0], pixels.shape[1] // patch, pixels.shape[2] // patch, -1)
    return [replicate(states[i][:, 1:]).astype(jnp.float32).reshape(shape) for i in layers]


@functools.partial(jax.jit, static_argnames=("config", "head", "layers"))
def window_logits(params, weights, state, pixels, *, config, head, layers) -> jax.Array:
    """Logits [B, h, w, classes] of windows [B, H, W, 3], at the head's resolution."""
    maps = maps_of(config, params, pixels, layers)
    return _head(head)(weights, state, maps, False)[0]


def _head(name):
    return {"linear": heads.linear_head, "upernet": heads.upernet}[name]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the pixels that are not ignored; logits are resized to the labels [B, H, W]."""
    logits = heads.resize(logits, labels.shape[1:])
    counted = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    return jnp.sum(each * counted) / jnp.maximum(counted.sum(), 1)


# The recipe and not the optimizer is what a compiled update belongs to: it is the same in every
# run of an evaluator, while each optimizer would be compiled anew.
@functools.partial(jax.jit, static_argnames=("config", "head", "layers", "recipe", "tune", "aid"))
def _update(
    params, learnt, state, moments, pixels, labels, key, *, config, head, layers, recipe, tune, aid
):
    labels = replicate(labels)  # as the maps are
    tx = optimizer(learnt, config.vit.depth, recipe)

    def loss_of(learnt):
        tower = {**params, "vit": learnt["vit"]} if tune else params
        drops, dropout = jax.random.split(key)
        keys = jax.random.split(drops, pixels.shape[0]) if tune else None
        maps = maps_of(config, tower, pixels, layers, keys)
        options = {"aid": aid} if head == "upernet" else {}
        main, helped, new = _head(head)(learnt["head"], state, maps, True, dropout, **options)
        loss = cross_entropy(main, labels)
        if helped is not None:
            loss += _AID * cross_entropy(helped, labels)
        return loss, new

    (loss, state), gradient = jax.value_and_grad(loss_of, has_aux=True)(learnt)
    updates, moments = tx.update(gradient, moments, learnt)
    return optax.apply_updates(learnt, updates), state, moments, loss


def windows(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis, the last one flush with its end."""
    count = max(-(-(length - window) // stride), 0) + 1
    return [min(i * stride, length - window) for i in range(count)]


@dataclass
class Segmentation:
    """mIoU of a head on the tower: linear, or UperNet with frozen or tuned backbone.

    dataset: "embedded" (scenes: the background and six shapes) or "ade20k" (150 classes).
    head: "linear" (frozen; state of 45 in 48 blocks) or "upernet" (states at a quarter, a half,
    three quarters and all of the blocks). tune: train the tower too. crop, stride: pixels of
    windows; 0: the published 504 and 322, or as much of the embedded pictures.
    The published schedule is steps=80000, warmup=1500, rate=4e-5, batch_size=16, weight_decay 0 for
    the linear head and 0.05 for UperNet; tuned: layer_decay=0.95 and drop path 0.4 in the model.

    Figures, as fractions: `<set>.<head>.miou`, `.pixel_accuracy`, head being linear, upernet or
    upernet_tuned. `details`: "confusion" [C, C].
    """

    tokenizer: Tokenizer
    dataset: str = EMBEDDED
    root: str = "data"
    partial: bool = False
    head: str = "linear"
    tune: bool = False
    channels: int = 0  # of UperNet; 0: 1536, or 64 on the embedded pictures
    crop: int = 0
    stride: int = 0
    steps: int = 150
    warmup: int = 10
    rate: float = 2e-3
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    train_images: int = 400
    test_images: int = 100
    batch_size: int = 16
    seed: int = 0
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; there are {', '.join(HEADS)}")
        if not self.steps > self.warmup >= 0:
            raise ValueError(f"steps={self.steps} must be more than warmup={self.warmup}")

    def run(self, config: ModelConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Train the head and evaluate, yielding (name, value)."""
        patch, depth = config.vit.patch_size, config.vit.depth
        embedded = self.dataset == EMBEDDED
        if embedded:
            crop, stride = self.crop or 4 * patch, self.stride or 2 * patch
            train, test = (
                scene_set(split, count, 6 * patch)
                for split, count in (("train", self.train_images), ("test", self.test_images))
            )
            classes = 1 + len(scenes.SHAPES)
        else:
            crop, stride = self.crop or 504, self.stride or 322
            train, test = ade20k(Path(self.root), self.dataset, crop, patch, self.partial)
            classes = 150
        if crop % patch:
            raise ValueError(f"crop={crop} is not a multiple of the patch size {patch}")
        quarters = tuple(max(1, round(depth * q / 4)) for q in (1, 2, 3, 4))
        layers = (max(1, round(depth * 45 / 48)),) if self.head == "linear" else quarters
        static = dict(config=config, head=self.head, layers=layers)
        learnt, state = self._train(params, train, crop, classes, embedded, static)
        tower = {**params, "vit": learnt["vit"]} if self.tune else params
        counts = np.zeros((classes, classes), np.int64)
        for pixels, labels in test:
            logits = self._slide(tower, learnt["head"], state, pixels, crop, stride, static)
            logits = np.asarray(heads.resize(logits[None], labels.shape))[0]
            counted = labels != IGNORED
            counts += scores.confusion(labels[counted], logits.argmax(-1)[counted], classes)
        self.details = {"confusion": counts}
        name = f"{self.dataset}.{self.head}{'_tuned' if self.tune else ''}"
        yield f"{name}.miou", scores.mean_iou(counts)
        yield f"{name}.pixel_accuracy", float(np.trace(counts) / counts.sum())

    def _train(self, params, train, crop, classes, embedded, static):
        config = static["config"]
        width, key = config.vit.width, jax.random.key(self.seed)
        if self.head == "linear":
            head, state = heads.init_linear_head(key, width, classes)
        else:
            channels = self.channels or (64 if embedded else 1536)
            head, state = heads.init_upernet(key, width, channels, classes)
        learnt = {"head": head, **({"vit": params["vit"]} if self.tune else {})}
        recipe = Recipe(
            self.rate, self.steps, self.warmup, self.weight_decay, self.layer_decay
        )
        moments = optimizer(learnt, config.vit.depth, recipe).init(learnt)
        rng = np.random.default_rng(self.seed)
        for step in range(self.steps):
            chosen = rng.integers(len(train), size=self.batch_size)
            rows = [crop_of(*train[number], crop, rng, embedded) for number in chosen]
            pixels, labels = place_batch([np.stack(column) for column in zip(*rows, strict=True)])
            learnt, state, moments, loss = _update(
                params, learnt, state, moments, pixels, labels, jax.random.fold_in(key, step),
                recipe=recipe, tune=self.tune, aid=2 if self.tune else 1, **static,
            )  # fmt: skip
        if not np.isfinite(float(loss)):
            raise FloatingPointError("the head's loss is not finite; lower its rate")
        return learnt, state

    def _slide(self, params, weights, state, pixels, crop, stride, static) -> np.ndarray:
        """Logits [H, W, classes] of one image, averaged where windows overlap."""
        height, width = pixels.shape[:2]
        tops, lefts = windows(height, crop, stride), windows(width, crop, stride)
        places = [(y, x) for y in tops for x in lefts]
        cut = np.stack([pixels[y : y + crop, x : x + crop] for y, x in places])
        step = functools.partial(window_logits, params, weights, state, **static)
        found = features.in_batches(step, (cut,), self.batch_size)
        seen = np.zeros((height, width, 1), np.float32)
        total = np.zeros((height, width, found.shape[-1]), np.float32)
        for (y, x), logits in zip(places, found, strict=True):
            total[y : y + crop, x : x + crop] += np.asarray(
                heads.resize(logits[None], (crop, crop))
            )[0]
            seen[y : y + crop, x : x + crop] += 1
        return total / seen
