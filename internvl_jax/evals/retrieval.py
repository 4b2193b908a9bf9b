"""Image-text retrieval and relation swaps on the embedded scenes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from internvl_jax.data import conversation, scenes, sources, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import features, scores
from internvl_jax.models import InternVLConfig

CUTOFFS = (1, 5, 10)


def distinct_scenes(count: int) -> list[scenes.Scene]:
    """Held-out scenes whose captions all differ in every language."""
    return [scenes.scene("test", index) for index in scenes.distinct("test", count)]


def modes_of(config: InternVLConfig, modes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The image features to evaluate: those asked for, or all that the model has."""
    return modes or (("c", "g") if config.num_queries else ("c",))


@dataclass
class Retrieval:
    """Recall at 1, 5 and 10 among held-out images, each with its own caption.

    Figures: `<mode>.<lang>.i2t_r1`, `…t2i_r1` and so on, as fractions; mode "c" is InternVL-C,
    "g" InternVL-G. Protocol of the paper's Table 7: "summarize:" before each caption, cosine
    similarity, no re-ranking.

    `details`: "images" uint8 [N, H, W, 3]; "captions.<lang>"; "<mode>.<lang>" → i2t_rank and
    t2i_rank [N], i2t_hits and t2i_hits [N, 10].
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    text_length: int = 64
    modes: tuple[str, ...] | None = None
    count: int = 300
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        chosen = distinct_scenes(self.count)
        images = scenes.render(chosen, config.vit.image_size)
        self.details = {"images": images}
        numbers = np.arange(self.count)
        texts = {}
        for language in self.languages:
            captions = [text.scene_captions(s.description, language)[0] for s in chosen]
            self.details[f"captions.{language}"] = captions
            ids = self.tokenizer.encode_batch(
                [conversation.contrastive_text(caption) for caption in captions], self.text_length
            )
            texts[language] = features.text_features(config, params, ids, self.batch_size)
        for mode in modes_of(config, self.modes):
            pictures = features.image_features(config, params, images, mode, self.batch_size)
            for language in self.languages:
                found = self.details[f"{mode}.{language}"] = {}
                for way, (queries, gallery) in {
                    "i2t": (pictures, texts[language]),
                    "t2i": (texts[language], pictures),
                }.items():
                    rank, hits = scores.ranks(queries, gallery, numbers, numbers)
                    found |= {f"{way}_rank": rank, f"{way}_hits": hits}
                    for k in CUTOFFS:
                        yield f"{mode}.{language}.{way}_r{k}", scores.recall(rank, k)


@dataclass
class Relation:
    """Can the model tell "A left of B" from "B left of A"? Winoground's scores on swapped scenes.

    Figures: `<mode>.<lang>.text`, `.image`, `.group`, as fractions (chance 1/4, 1/4, 1/6).
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    text_length: int = 64
    modes: tuple[str, ...] | None = None
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        source = sources.EmbeddedScenes("relation_swap", image_size=config.vit.image_size)
        texts = {}
        for language in self.languages:
            captions = [source.texts(i)["captions"][language][0] for i in range(len(source))]
            ids = self.tokenizer.encode_batch(
                [conversation.contrastive_text(caption) for caption in captions], self.text_length
            )
            texts[language] = features.text_features(config, params, ids, self.batch_size)
        for mode in modes_of(config, self.modes):
            images = features.image_features(config, params, source.images, mode, self.batch_size)
            for language in self.languages:
                pairs = [a.reshape(-1, 2, a.shape[-1]) for a in (images, texts[language])]
                for name, value in scores.swaps(*pairs).items():
                    yield f"{mode}.{language}.{name}", value
