"""Probes of the frozen vision tower: linear, attention pooling, and nearest neighbours.

Paper Table 4 and the released classification code: BatchNorm and a linear layer on the class token
beside the mean patch token, SGD with Nesterov momentum, one warm-up epoch and a cosine to zero,
crops, flips, mixup and cutmix, label smoothing 0.1.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from internvl_jax.data import image, sources
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import datasets, features, files, prompts, scores
from internvl_jax.evals import heads as head_layers
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.models import ModelConfig, bind
from internvl_jax.sharding import place_batch, replicate

KINDS = ("linear", "attention", "knn")
# Sets on which a probe of ImageNet-1K is judged besides its validation set.
VARIANTS = ("imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch")


@functools.partial(jax.jit, static_argnames=("config",))
def tower_features(params: features.Params, pixels: jax.Array, *, config: ModelConfig) -> jax.Array:
    """[B, 2·D]: the class token of the last block, and the mean of the patch tokens."""
    tokens = bind(config, params).vit(pixels).astype(jnp.float32)
    return replicate(jnp.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=-1))


@functools.partial(jax.jit, static_argnames=("config",))
def tower_tokens(params: features.Params, pixels: jax.Array, *, config: ModelConfig) -> jax.Array:
    """[B, 1 + N, D] of the last block."""
    return replicate(bind(config, params).vit(pixels).astype(jnp.float32))


def mix(
    rng: np.random.Generator, pixels: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup (alpha 0.8) or cutmix (alpha 1.0), each half of the batches, with the reversed batch.

    pixels: uint8 [B, H, W, 3]; targets: [B, C]. Both mixes are of whole batches, as in timm.
    """
    other, height, width = pixels[::-1], *pixels.shape[1:3]
    if rng.random() < 0.5:
        share = rng.beta(0.8, 0.8)
        mixed = np.rint(share * pixels + (1 - share) * other).astype(np.uint8)
    else:
        side = np.sqrt(1 - rng.beta(1.0, 1.0))
        y, x = int(rng.integers(height)), int(rng.integers(width))
        h, w = int(height * side) // 2, int(width * side) // 2
        rows, columns = slice(max(y - h, 0), y + h), slice(max(x - w, 0), x + w)
        mixed = pixels.copy()
        mixed[:, rows, columns] = other[:, rows, columns]
        cut = mixed[0, rows, columns].shape
        share = 1 - cut[0] * cut[1] / (height * width)
    return mixed, share * targets + (1 - share) * targets[::-1]


@functools.partial(jax.jit, static_argnames=("kind", "heads"))
def _logits(weights, state, x, *, kind, heads, train=False):
    if kind == "attention":
        x = head_layers.attention_pool(weights["pool"], x, heads)
    x, state = head_layers.batch_norm(weights["norm"], state, x, train)
    return x @ weights["linear"]["kernel"] + weights["linear"]["bias"], state


@functools.partial(jax.jit, static_argnames=("kind", "heads", "tx"))
def _update(weights, state, moments, x, targets, *, kind, heads, tx):
    def loss_of(weights):
        logits, new = _logits(weights, state, x, kind=kind, heads=heads, train=True)
        return optax.softmax_cross_entropy(logits, targets).mean(), new

    (loss, state), gradient = jax.value_and_grad(loss_of, has_aux=True)(weights)
    updates, moments = tx.update(gradient, moments, weights)
    return optax.apply_updates(weights, updates), state, moments, loss


@dataclass
class Probe:
    """Top-1 of a head trained on the frozen vision tower.

    kind: "linear" (the paper's), "attention" (a pooling block before it) or "knn" (weighted votes
    of 20 neighbours at temperature 0.07, nothing is trained).
    dataset: "embedded" (the scenes' 42 seen colour-shape pairs, `train_images` of them to learn
    from) or "imagenet1k" (folders imagenet1k/train, imagenet1k and those of `VARIANTS` that are
    there). rate: of 512 images; the peak is rate · batch / 512. augment: crops, flips and mixes.

    Figures, as fractions: `<set>.top1`, `.top5`, `.mean_per_class`. Of ImageNet-A and -R only the
    200 classes of the set compete.
    """

    tokenizer: Tokenizer
    kind: str = "linear"
    dataset: str = EMBEDDED
    root: str = "data"
    partial: bool = False
    epochs: int = 10
    rate: float = 0.1
    augment: bool = True
    train_images: int = 1000
    batch_size: int = 100
    seed: int = 0
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown probe {self.kind!r}; there are {', '.join(KINDS)}")
        if self.epochs < 2:
            raise ValueError(f"epochs={self.epochs} must be at least 2: the first is the warm-up")

    def run(self, config: ModelConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Train the head and evaluate, yielding (name, value)."""
        size = config.vit.image_size
        train, tests = self._embedded(size) if self.dataset == EMBEDDED else self._imagenet(size)
        known = int(train[1].max()) + 1
        predict = (self._neighbours if self.kind == "knn" else self._train)(
            config, params, *train, known
        )
        self.details = {}
        for name, (pictures, labels, allowed) in tests.items():
            logits = predict(pictures)
            if allowed is not None:
                logits = logits[:, allowed]
            self.details[name] = {"labels": labels, "predicted": logits.argmax(axis=1)}
            for metric, value in scores.classification(logits, labels).items():
                yield f"{name}.{metric}", value

    def _features(self, config, params, pictures):
        step = tower_tokens if self.kind == "attention" else tower_features
        step = functools.partial(step, params, config=config)
        return features.in_batches(step, (pictures,), self.batch_size)

    def _neighbours(self, config, params, pictures, labels, known, k=20, temperature=0.07):
        bank = _unit(self._features(config, params, pictures))
        targets = np.eye(known)[labels]

        def predict(pictures):
            similar = _unit(self._features(config, params, pictures)) @ bank.T
            best = np.argpartition(-similar, min(k, len(bank)) - 1, axis=1)[:, :k]
            votes = np.exp(np.take_along_axis(similar, best, axis=1) / temperature)
            return np.einsum("nk,nkc->nc", votes, targets[best])

        return predict

    def _train(self, config, params, pictures, labels, known):
        width, heads = config.vit.width, config.vit.num_heads
        inputs = width if self.kind == "attention" else 2 * width
        key = jax.random.key(self.seed)
        weights = {"linear": head_layers.init_linear(key, inputs, known)}
        weights["norm"], state = head_layers.init_batch_norm(inputs)
        if self.kind == "attention":
            weights["pool"] = head_layers.init_attention_pool(jax.random.fold_in(key, 1), width)
        steps = max(len(labels) // self.batch_size, 1)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.rate * self.batch_size / 512, steps, self.epochs * steps
        )
        tx = optax.chain(
            optax.clip_by_global_norm(5.0), optax.sgd(schedule, momentum=0.9, nesterov=True)
        )
        moments = tx.init(weights)
        extract = tower_tokens if self.kind == "attention" else tower_features
        cached = None if self.augment else self._features(config, params, pictures)
        smooth = np.full((known, known), 0.1 / known) + 0.9 * np.eye(known)
        rng = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            order = rng.permutation(len(labels))
            for step in range(steps):
                chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                targets = smooth[labels[chosen]]
                if cached is None:
                    pixels, targets = mix(rng, _cropped(pictures, chosen, rng), targets)
                    x = extract(params, place_batch([pixels])[0], config=config)
                else:
                    x = cached[chosen]
                weights, state, moments, loss = _update(
                    weights, state, moments, x, targets.astype(np.float32),
                    kind=self.kind, heads=heads, tx=tx,
                )  # fmt: skip
        if not np.isfinite(float(loss)):
            raise FloatingPointError("the probe's loss is not finite; lower its rate")

        def predict(pictures):
            x = self._features(config, params, pictures)
            return np.asarray(_logits(weights, state, x, kind=self.kind, heads=heads)[0])

        return predict

    def _embedded(self, size):
        source = sources.EmbeddedScenes("train", image_size=size)
        single = [i for i, s in enumerate(source.scenes) if len(s.objects) == 1]
        single = np.array(single[: self.train_images])
        labels = np.array([source.texts(i)["class_index"] for i in single])
        test = sources.EmbeddedScenes("test_single", image_size=size)
        wanted = np.array([test.texts(i)["class_index"] for i in range(len(test))])
        seen = np.unique(np.concatenate([labels, wanted]))
        number = np.searchsorted(seen, labels), np.searchsorted(seen, wanted)
        return (source.images[single], number[0]), {"scenes": (test.images, number[1], None)}

    def _imagenet(self, size):
        datasets.get(self.dataset, "zero_shot")
        root = Path(self.root)
        folder = root / self.dataset / "train"
        try:
            places, labels, names = files.class_folders(folder)
        except files.DatasetError as error:
            raise files.DatasetError(f"the probe learns from {folder}, but {error}") from error
        train = files.Pictures(places, size, image.center_crop), labels
        tests = {}
        for name, where in [(self.dataset, f"{self.dataset}/val"), *((v, v) for v in VARIANTS)]:
            if not (root / where).is_dir():
                continue
            places, wanted, own = files.class_folders(root / where)
            found = {"images": len(places), "classes": len(own)}
            datasets.check(name, root, found, self.partial)
            numeric = all(one.isdecimal() for one in own)
            allowed = [int(x) for x in own] if numeric else prompts.imagenet_classes(own, names)
            tests[name] = files.Pictures(places, size, image.center_crop), wanted, allowed
        if not tests:
            raise files.DatasetError(f"no test pictures: expected {root / self.dataset / 'val'}")
        return train, tests


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _cropped(pictures, chosen, rng) -> np.ndarray:
    """A random part of 8 % to 100 % of each picture, mirrored half of the time."""
    rows = []
    for number in chosen:
        if isinstance(pictures, np.ndarray):
            size, picture = pictures.shape[1], Image.fromarray(pictures[number])
        else:
            size, picture = pictures.size, pictures.places[number].open()
        crop = image.random_resized_crop(picture, size, rng, scale=(0.08, 1.0))
        rows.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(rows)
