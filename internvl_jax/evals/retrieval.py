"""Image-text retrieval on the embedded scenes and published sets, and relation swaps."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.data import conversation, scenes, sources, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import datasets, features, matching, scores
from internvl_jax.evals.datasets import EMBEDDED
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
    """Recall at 1, 5 and 10 between images and captions. Protocol of the paper's Tables 7 and 13.

    "summarize:" before each caption, cosine similarity; an image may have several captions, and
    the best-placed one counts.

    datasets: names of the table, or "embedded"; root: where the published ones lie; partial: take
    what is there of them. captions_per_image: of the embedded scenes (they have two to four).
    rerank: how many of the best hits of InternVL-G its matching head puts in order (0: none, as in
    the paper's tables).

    Figures: `<mode>.<lang>.i2t_r1`, `…t2i_r1` and so on, as fractions; mode "c" is InternVL-C,
    "g" InternVL-G, "itm" InternVL-G re-ranked. Published sets have their name in front.

    `details` of the embedded scenes: "images" uint8 [N, H, W, 3]; "captions.<lang>"; of any,
    "<mode>.<lang>" → i2t_rank and t2i_rank [N], i2t_hits and t2i_hits [N, 10].
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    text_length: int = 64
    modes: tuple[str, ...] | None = None
    count: int = 300
    captions_per_image: int = 1
    rerank: int = 0
    datasets: tuple[str, ...] = (EMBEDDED,)
    root: str = "data"
    partial: bool = False
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        self.details = {}
        size, sets = config.vit.image_size, []
        for name in self.datasets:
            if name == EMBEDDED:
                sets.append(("", *self._scenes(size)))
                continue
            known = datasets.get(name, "retrieval").languages
            languages = [x for x in self.languages if x in known]
            if not languages:
                raise datasets.DatasetError(
                    f"{name} has captions in {', '.join(known)}, not in {', '.join(self.languages)}"
                )
            read = {
                language: datasets.captioned(
                    name, "retrieval", Path(self.root), language, size, self.partial
                )
                for language in languages
            }
            # The pictures are the same in every language.
            pictures = read[languages[0]][0]
            sets.append((f"{name}.", pictures, {x: c for x, (_, c) in read.items()}))
        for prefix, pictures, captions in sets:
            for key, value in self._recalls(config, params, pictures, captions, prefix):
                yield f"{prefix}{key}", value

    def _scenes(self, size):
        chosen = distinct_scenes(self.count)
        images = scenes.render(chosen, size)
        self.details["images"] = images
        captions = {}
        for language in self.languages:
            all_captions = [text.scene_captions(s.description, language) for s in chosen]
            captions[language] = [list(c[: self.captions_per_image]) for c in all_captions]
            self.details[f"captions.{language}"] = [c for own in captions[language] for c in own]
        return images, captions

    def _recalls(self, config, params, images, captions, prefix):
        plain, texts, owners = {}, {}, {}
        for language, groups in captions.items():
            flat = [conversation.clean_caption(caption) for own in groups for caption in own]
            prefixed = [conversation.SUMMARIZE + caption for caption in flat]
            ids = self.tokenizer.encode_batch(prefixed, self.text_length)
            texts[language] = features.text_features(config, params, ids, self.batch_size)
            # The matching head learnt captions without the prefix.
            plain[language] = self.tokenizer.encode_batch(flat, self.text_length)
            owners[language] = np.repeat(np.arange(len(groups)), [len(own) for own in groups])
        numbers = np.arange(len(images))
        for mode in modes_of(config, self.modes):
            pictures = features.image_features(config, params, images, mode, self.batch_size)
            for language, own in owners.items():
                sides = {"i": (pictures, numbers), "t": (texts[language], own)}
                orders = {}
                for way in ("i2t", "t2i"):
                    (queries, q), (gallery, g) = sides[way[0]], sides[way[2]]
                    rank, hits = scores.ranks(queries, gallery, q, g, max(10, self.rerank))
                    orders[way] = hits, rank, q, g
                yield from self._report(f"{mode}.{language}", orders, prefix)
                if mode == "g" and self.rerank:
                    again = {
                        way: matching.rerank(
                            config, params, images, plain[language], hits[:, : self.rerank],
                            *order, image_queries=way == "i2t", batch_size=self.batch_size,
                        )
                        for way, (hits, *order) in orders.items()
                    }  # fmt: skip
                    yield from self._report(f"itm.{language}", again, prefix)

    def _report(self, key, orders, prefix):
        found = self.details[f"{prefix}{key}"] = {}
        for way, (hits, rank, *_) in orders.items():
            found |= {f"{way}_rank": rank, f"{way}_hits": hits[:, :10]}
            for k in CUTOFFS:
                yield f"{key}.{way}_r{k}", scores.recall(rank, k)


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
