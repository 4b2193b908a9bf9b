"""Zero-shot classification: the class whose prompts lie nearest to the image.

Protocol of the paper's Tables 6 and 16: each class's prompts get the prefix "summarize:", are
encoded and brought to unit length, averaged, and brought to unit length again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.data import conversation, scenes, sources, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import datasets, features, prompts, scores
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.models import InternVLConfig


def class_embeddings(
    config: InternVLConfig,
    params: features.Params,
    prompts: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    text_length: int,
    batch_size: int = 100,
) -> np.ndarray:
    """One unit embedding per class, [C, E], from its prompts (without the prefix)."""
    flat = [conversation.SUMMARIZE + prompt for group in prompts for prompt in group]
    ids = tokenizer.encode_batch(flat, text_length)
    embeddings = features.text_features(config, params, ids, batch_size)
    ends = np.cumsum([len(group) for group in prompts])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(embeddings, ends)])
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


@dataclass
class ZeroShot:
    """Zero-shot classification of the embedded pictures, or of published sets (`datasets`).

    datasets: names of the table, or "embedded"; root: where the published ones lie; partial: take
    what is there of them. Their languages are those of `languages` that they have class names in.

    Figures of published sets, as fractions: `<set>.<lang>.top1`, `.top5`, `.mean_per_class`. On
    ImageNet-A and -R only their 200 classes compete. Figures of the embedded ones are top-1 over
    the scenes' 48 colour-shape classes and over the ten digits: `scenes.<lang>` on held-out images
    of seen pairs; `unseen_pairs.<lang>` on pairs that training never shows, still among all 48;
    `unseen_color` and `unseen_shape`, the part of the English class predicted for those that is
    right; `digits.<lang>`.

    `details`: "<set>.<lang>" → labels, predicted, confusion, and `scores.classification` of the
    embedded sets; "classes.<set>" → names; "prompts.<set>.<lang>" → whose templates were used.
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    text_length: int = 64
    mode: str = "c"
    datasets: tuple[str, ...] = (EMBEDDED,)
    root: str = "data"
    partial: bool = False
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        self.details = {}
        sets = [
            (name, *datasets.classification(name, Path(self.root), size, self.partial))
            for size in (config.vit.image_size,)
            for name in self.datasets
            if name != EMBEDDED
        ]
        if EMBEDDED in self.datasets:
            yield from self._embedded(config, params)
        for one in sets:
            yield from self._published(config, params, *one)

    def _published(self, config, params, name, images, labels, folders):
        known = datasets.DATASETS[name]
        built = {
            language: prompts.build(known.key or name, language, folders)
            for language in self.languages
            if language in known.languages
        }
        if not built:
            raise datasets.DatasetError(
                f"{name} has class names in {', '.join(known.languages)}, "
                f"not in {', '.join(self.languages)}"
            )
        encoded = features.image_features(config, params, images, self.mode, self.batch_size)
        for language, made in built.items():
            classes = class_embeddings(
                config, params, made.texts, self.tokenizer, self.text_length, self.batch_size
            )
            similar = encoded @ classes.T
            predicted = np.argmax(similar, axis=-1)
            self.details[f"prompts.{name}.{language}"] = made.source
            self.details[f"{name}.{language}"] = {"labels": labels, "predicted": predicted}
            for metric, value in scores.classification(similar, labels).items():
                yield f"{name}.{language}.{metric}", value

    def _embedded(self, config, params):
        self.details |= {
            "classes.scenes": [" ".join(pair) for pair in scenes.ALL_PAIRS],
            "classes.digits": list(text.DIGITS["en"]),
        }
        size = config.vit.image_size
        sets = {
            "scenes": (*_labelled("test_single", size), text.class_prompts),
            "unseen_pairs": (*_labelled("unseen_pairs", size), text.class_prompts),
            "digits": (*_digits(size), text.digit_prompts),
        }
        encoded = {
            name: features.image_features(config, params, images, self.mode, self.batch_size)
            for name, (images, _, _) in sets.items()
        }
        embeddings: dict[Any, np.ndarray] = {}
        for name, (_, labels, texts) in sets.items():
            for language in self.languages:
                if (texts, language) not in embeddings:
                    embeddings[texts, language] = class_embeddings(
                        config,
                        params,
                        texts(language),
                        self.tokenizer,
                        self.text_length,
                        self.batch_size,
                    )
                classes = embeddings[texts, language]
                similar = encoded[name] @ classes.T
                predicted = np.argmax(similar, axis=-1)
                self.details[f"{name}.{language}"] = {
                    "labels": labels,
                    "predicted": predicted,
                    "confusion": scores.confusion(labels, predicted, len(classes)),
                    **scores.classification(similar, labels),
                }
                yield f"{name}.{language}", float(np.mean(predicted == labels))
        if "en" in self.languages:
            unseen = self.details["unseen_pairs.en"]
            pairs = np.array(scenes.ALL_PAIRS)
            right = pairs[unseen["predicted"]] == pairs[unseen["labels"]]
            yield "unseen_color", float(right[:, 0].mean())
            yield "unseen_shape", float(right[:, 1].mean())


def _labelled(split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    source = sources.EmbeddedScenes(split, image_size=size)
    labels = [source.texts(i)["class_index"] for i in range(len(source))]
    return source.images, np.array(labels)


def _digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    source = sources.EmbeddedDigits("test", size)
    return source.images, source.labels
