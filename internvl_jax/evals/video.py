"""Zero-shot classification and retrieval of videos: features of frames, averaged.

Paper Tables 8 and 14. Frames lie at every ceil(n / count)-th place, beginning in the middle of the
first interval, as the MSR-VTT program has it; one frame is then the middle one.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from internvl_jax.data import conversation, image, scenes, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals import datasets, features, files, prompts, scores
from internvl_jax.evals.datasets import EMBEDDED
from internvl_jax.evals.retrieval import modes_of
from internvl_jax.evals.zero_shot import class_embeddings
from internvl_jax.models import InternVLConfig

_FRAMES = 16  # of an embedded video


def sampled(frames: Sequence[Any], count: int) -> list[Any]:
    """`count` of the frames, evenly; shorter videos repeat their last frame."""
    step = -(-len(frames) // count)
    chosen = list(frames[step // 2 :: step][:count])
    return chosen + [chosen[-1]] * (count - len(chosen))


@dataclass
class Video:
    """Zero-shot classification of videos, and retrieval between videos and captions.

    datasets: "embedded" (an object that moves: 48 colour-shape classes, and captions of 48 videos),
    k400, k600, k700 (classification), msrvtt (retrieval); root: where the frames lie.
    frames: how many to average. dual_softmax: score retrieval as the released MSR-VTT program does.

    Figures, as fractions: `<set>.<lang>.<frames>f.top1`, `.top5`, `.mean_per_class`, and `.avg`,
    the mean of the first two; retrieval: `<set>.<mode>.<lang>.<frames>f.v2t_r1`, `t2v_r1`, ….
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = ("en",)
    text_length: int = 64
    modes: tuple[str, ...] | None = None
    frames: tuple[int, ...] = (1, 8)
    dual_softmax: bool = False
    datasets: tuple[str, ...] = (EMBEDDED,)
    root: str = "data"
    partial: bool = False
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: InternVLConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        self.details = {}
        size, root = config.vit.image_size, Path(self.root)
        for name in self.datasets:
            if name == EMBEDDED:
                videos, labels = _moving(size)
                given = {language: text.class_prompts(language) for language in self.languages}
                yield from self._classify(config, params, name, videos, labels, given)
                captions = {x: [group[0] for group in classes] for x, classes in given.items()}
                first = [videos[number] for number in range(len(scenes.ALL_PAIRS))]
                yield from self._retrieve(config, params, name, first, captions)
            elif name == "msrvtt":
                videos, captions = _msrvtt(root, self.partial)
                yield from self._retrieve(config, params, name, videos, {"en": captions})
            else:
                videos, labels, made = _kinetics(name, root, self.partial)
                self.details[f"prompts.{name}.en"] = made.source
                given = {"en": made.texts}
                yield from self._classify(config, params, name, videos, labels, given)

    def _encode(self, config, params, videos, count, mode) -> np.ndarray:
        """One unit feature per video: the mean of its frames' features."""
        chosen = [frame for video in videos for frame in sampled(video, count)]
        size = config.vit.image_size
        if isinstance(chosen[0], files.Place):
            pictures = files.Pictures(chosen, size, image.center_crop)
        else:
            pictures = np.stack(chosen)
        each = features.image_features(config, params, pictures, mode, self.batch_size)
        mean = each.reshape(len(videos), count, -1).mean(axis=1)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def _classify(self, config, params, name, videos, labels, given):
        for count in self.frames:
            encoded = self._encode(config, params, videos, count, "c")
            for language, texts in given.items():
                classes = class_embeddings(
                    config, params, texts, self.tokenizer, self.text_length, self.batch_size
                )
                found = scores.classification(encoded @ classes.T, labels)
                found["avg"] = (found["top1"] + found["top5"]) / 2
                for metric, value in found.items():
                    yield f"{name}.{language}.{count}f.{metric}", value

    def _retrieve(self, config, params, name, videos, captions):
        modes = modes_of(config, self.modes)
        numbers = np.arange(len(videos))
        for language, texts in captions.items():
            ids = self.tokenizer.encode_batch(
                [conversation.contrastive_text(caption) for caption in texts], self.text_length
            )
            encoded = features.text_features(config, params, ids, self.batch_size)
            for mode in modes:
                for count in self.frames:
                    similar = self._encode(config, params, videos, count, mode) @ encoded.T
                    for way, one in (("v2t", similar), ("t2v", similar.T)):
                        one = scores.dual_softmax(one) if self.dual_softmax else one
                        rank, _ = scores.ranks_of_scores(one, numbers, numbers)
                        for k in (1, 5, 10):
                            key = f"{name}.{mode}.{language}.{count}f.{way}_r{k}"
                            yield key, scores.recall(rank, k)


def _moving(size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """A small object of each colour and shape moving in each direction, and its class."""
    videos, labels = [], []
    for turn, direction in enumerate(scenes.DIRECTIONS):
        for label in range(len(scenes.ALL_PAIRS)):
            videos.append(scenes.frames(_single(label, turn), _FRAMES, direction, size))
            labels.append(label)
    return videos, np.array(labels)


def _single(label: int, turn: int) -> scenes.Scene:
    """The held-out scene number `turn` with one object of a class."""
    pair = scenes.ALL_PAIRS[label]
    split = "unseen_pairs" if pair in scenes.HELD_OUT_PAIRS else "test_single"
    pairs = scenes.UNSEEN_PAIRS if split == "unseen_pairs" else scenes.SEEN_PAIRS
    return scenes.scene(split, pairs.index(pair) + turn * len(pairs))


def _kinetics(name: str, root: Path, partial: bool):
    folder = root / name
    videos, labels = [], []
    try:
        classes = sorted(p.name for p in files.need(folder, "frames").iterdir() if p.is_dir())
        for label, one in enumerate(classes):
            found = [v for v in datasets.videos(folder / one) if v]
            videos += found
            labels += [label] * len(found)
    except files.DatasetError as error:
        raise files.DatasetError(f"{name}: {error}; put {datasets.layout(name, root)}") from error
    datasets.get(name, "video")
    datasets.check(name, root, {"images": len(videos), "classes": len(classes)}, partial)
    return videos, np.array(labels), prompts.build(name, "en", classes)


def _msrvtt(root: Path, partial: bool):
    folder = root / "msrvtt"
    try:
        listing = files.need(folder / "MSRVTT_JSFUSION_test.csv", "the list of captions")
        with open(listing, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        videos = []
        for row in rows:
            frames = files.need(folder / "frames" / row["video_id"], "frames of a video")
            videos.append([files.Place(path) for path in files.pictures_in(frames)])
    except files.DatasetError as error:
        where = datasets.layout("msrvtt", root)
        raise files.DatasetError(f"msrvtt: {error}; put {where}") from error
    datasets.check("msrvtt", root, {"images": len(videos), "texts": len(rows)}, partial)
    return videos, [row["sentence"] for row in rows]
