"""Captions that the middleware writes: of held-out scenes, and of the published sets."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvl_jax import generate
from internvl_jax.data import conversation, scenes, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.decoding import Decoding
from internvl_jax.evals import datasets, features, scores
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.evals.retrieval import distinct_scenes
from internvl_jax.models import InternVLConfig, bind
from internvl_jax.sharding import replicate


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def _captions(
    params: features.Params, pixels: jax.Array, prompts: jax.Array, *, config, decoding: Decoding
) -> jax.Array:
    result = generate.caption(bind(config, params), pixels, prompts, decoding)
    return replicate(result.ids[:, 0])


def write_captions(
    config: InternVLConfig,
    params: features.Params,
    images: np.ndarray,
    language: str,
    tokenizer: Tokenizer,
    decoding: Decoding,
    batch_size: int = 100,
) -> list[str]:
    """One caption for each image uint8 [N, H, W, 3], after the language's prompt.

    The prompt has a beginning-of-text id and no end (paper Table 10). All languages' prompts are
    padded to one length, so they share one compiled program.
    """
    prompts = {x: tokenizer.encode(p) for x, p in conversation.GENERATION_PROMPTS.items()}
    prompt = np.zeros(max(len(ids) for ids in prompts.values()), np.int32)
    prompt[: len(prompts[language])] = prompts[language]
    rows = np.broadcast_to(prompt, (len(images), len(prompt)))
    step = functools.partial(_captions, params, config=config, decoding=decoding)
    ids = features.in_batches(step, (images, rows), batch_size)
    return [tokenizer.decode(row).strip() for row in ids]


def names_right(caption: str, scene: scenes.Scene) -> dict[str, bool]:
    """Is the first colour, and the first shape, that an English caption names in the image?

    Only the first counts: a caption that lists every colour is not right by doing so.
    """
    words = scores.words(caption, "en")
    right = {}
    for attribute, known in (("color", scenes.COLORS), ("shape", scenes.SHAPES)):
        first = next((word for word in words if word in known), None)
        right[attribute] = first in {getattr(item, attribute) for item in scene.objects}
    return right


@dataclass
class Captioning:
    """Captions of held-out scenes in every language.

    Figures: `color`, `shape`: share of images whose English caption names first a colour (shape)
    that an object of the image has; `exact.<lang>`: share of captions that are one of the image's
    own; `cider.<lang>` against all of the image's own captions, with this project's word
    splitting (`scores.words`: characters in Chinese), so not comparable with published figures.
    Greedy by default; the paper's protocol is num_beams=5, min_new_tokens=8, max_new_tokens=30.

    `details`: "images"; "captions.<lang>" and "references.<lang>", lists; "right" → color and
    shape bool [N]; "cider.<lang>" [N].
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    count: int = 300
    num_beams: int = 1
    min_new_tokens: int = 0
    max_new_tokens: int = 32
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        chosen = distinct_scenes(self.count)
        images = scenes.render(chosen, config.vit.image_size)
        self.details = {"images": images}
        decoding = Decoding(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            num_beams=self.num_beams,
            stop_ids=(self.tokenizer.eos_id,),
        )
        for language in self.languages:
            captions = write_captions(
                config, params, images, language, self.tokenizer, decoding, self.batch_size
            )
            references = [text.scene_captions(s.description, language) for s in chosen]
            self.details[f"captions.{language}"] = captions
            self.details[f"references.{language}"] = references
            if language == "en":
                each = [names_right(c, s) for c, s in zip(captions, chosen, strict=True)]
                right = {name: np.array([e[name] for e in each]) for name in ("color", "shape")}
                self.details["right"] = right
                for name, values in right.items():
                    yield name, float(values.mean())
            exact = [c in own for c, own in zip(captions, references, strict=True)]
            yield f"exact.{language}", float(np.mean(exact))
            mean, each = scores.cider(captions, references, language)
            self.details[f"cider.{language}"] = each
            yield f"cider.{language}", mean


@dataclass
class Captions:
    """Captions by the paper's protocol (Table 10): 5 beams, 8 to 30 new tokens, greedy otherwise.

    datasets: coco_caption, flickr30k_caption, nocaps (in English), or "embedded" (scenes, against
    all of their captions, in every language, without the least length: some are shorter).

    Figures: `<set>.<lang>.cider`, `.bleu1` to `.bleu4`, `.rouge_l`, published as 100 × them.
    `details`: "<set>.<lang>" → captions and references; "caveat": how words were split.
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    datasets: tuple[str, ...] = (EMBEDDED,)
    root: str = "data"
    partial: bool = False
    count: int = 100
    num_beams: int = 5
    min_new_tokens: int = 8
    max_new_tokens: int = 30
    batch_size: int = 50
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        self.details = {"caveat": scores.CAVEAT}
        size, sets = config.vit.image_size, []
        for name in self.datasets:
            if name != EMBEDDED:
                read = datasets.captioned(
                    name, "captioning", Path(self.root), "en", size, self.partial
                )
                sets.append((name, "en", *read))
                continue
            chosen = distinct_scenes(self.count)
            images = scenes.render(chosen, size)
            for language in self.languages:
                own = [list(text.scene_captions(s.description, language)) for s in chosen]
                sets.append((name, language, images, own))
        for name, language, images, references in sets:
            decoding = Decoding(
                max_new_tokens=self.max_new_tokens,
                min_new_tokens=0 if name == EMBEDDED else self.min_new_tokens,
                num_beams=self.num_beams,
                stop_ids=(self.tokenizer.eos_id,),
            )
            captions = write_captions(
                config, params, images, language, self.tokenizer, decoding, self.batch_size
            )
            found = {"captions": captions, "references": references}
            self.details[f"{name}.{language}"] = found
            yield f"{name}.{language}.cider", scores.cider(captions, references, language)[0]
            for metric, value in scores.bleu_and_rouge(captions, references, language).items():
                yield f"{name}.{language}.{metric}", value
