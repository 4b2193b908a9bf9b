"""Batches for training: a pure function of (data, seed, step).

A pipeline is one chain of Grain map datasets up to and including the batch, so batch number
`step` can be computed at any time, by any number of processes: resuming means starting to count
at the saved step, and no state besides the step is kept. Each process makes only the rows of the
global batch that its devices need.

Every text field is int32, right-padded with 0 to `text_length`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import grain
import numpy as np
from PIL import Image

from internvl_jax.data import conversation, image, sources, text

TASKS = ("language", "contrastive", "generative", "retrieval", "instruct")
AUGMENTATIONS = ("none", "random_resized_crop", "random_resized_crop_and_flip")
_VERSION = 1  # raise it when the order or the content of batches changes
_PREFETCH = 4  # batches prepared ahead of the training step


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches, or those rows of them that one process needs.

    dataset: batch number -> dict of arrays, endless; fingerprint: sha256 of everything that
    decides the batches, to be stored with a checkpoint; records: size of all sources together.
    """

    dataset: grain.MapDataset
    fingerprint: str
    records: int

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`, computed here and now."""
        return self.dataset[step]

    def iterate(self, start_step: int = 0) -> grain.DatasetIterator:
        """Batches from `start_step` on, prepared ahead by threads. Close the iterator after use."""
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=_PREFETCH)
        iterator = iter(self.dataset.to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        return iterator


def build(
    *,
    task: str,
    sources: Sequence[tuple[object, float]],
    batch_size: int,
    image_size: int,
    text_length: int,
    seed: int,
    tokenizer,
    languages: Sequence[str] = text.LANGUAGES,
    augment: str = "none",
    template: str = "vicuna_v1",
    rounds: int = 1,
    num_image_tokens: int = 0,
    rows: Sequence[int] | None = None,
) -> Pipeline:
    """Builds the pipeline of a training task.

    sources: (source or name for `sources.open_source`, weight) pairs; every batch holds them in
        the proportion of the weights.
    batch_size: of the global batch. text_length: of every text field; for "instruct" it counts
        the image tokens.
    languages: each example draws one of them.
    augment: one of AUGMENTATIONS. template, rounds, num_image_tokens: for "instruct", the chat
        template, questions per example, and tokens that stand for an image.
    rows: those of every batch to make, in this order; None for all.

    Raises ValueError on unknown names, an empty source, and a batch larger than the data.
    """
    _choose("task", task, TASKS)
    _choose("augment", augment, AUGMENTATIONS)
    for language in languages:
        _choose("language", language, text.LANGUAGES)
    if not languages:
        raise ValueError("languages is empty; name at least one")
    _choose("chat template", template, conversation.TRAINABLE)
    if task == "instruct" and text_length < num_image_tokens + 16:
        raise ValueError(
            f"text_length {text_length} leaves no room for a conversation beside "
            f"{num_image_tokens} image tokens"
        )
    opened = _open(sources, image_size, batch_size)
    settings = dict(
        task=task,
        batch_size=batch_size,
        image_size=image_size,
        text_length=text_length,
        seed=seed,
        languages=list(languages),
        augment=augment,
        template=template,
        rounds=rounds,
        num_image_tokens=num_image_tokens,
    )
    maker = _Maker(
        sources=tuple(source for source, _ in opened),
        tokenizer=tokenizer,
        length=text_length,
        image_size=image_size,
        languages=tuple(languages),
        augment=augment,
        template=template,
        rounds=rounds,
        num_image_tokens=num_image_tokens,
    )
    parts = [
        grain.MapDataset.range(len(source))
        .shuffle(seed=_seed(seed, "order", k))
        .repeat()
        .map(functools.partial(_place, k))
        for k, (source, _) in enumerate(opened)
    ]
    mixed = grain.MapDataset.mix(parts, [weight for _, weight in opened])
    examples = mixed.random_map(getattr(maker, task), seed=_seed(seed, "examples", 0))
    if rows is not None:
        examples = _Rows(examples, batch_size, tuple(rows))
    dataset = examples.batch(batch_size if rows is None else len(rows))
    identities = [(source.identity, weight) for source, weight in opened]
    content = [_VERSION, settings, identities, tokenizer.digest]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Pipeline(dataset, fingerprint, sum(len(source) for source, _ in opened))


class _Rows(grain.MapDataset):
    """Of every `batch_size` examples in turn, those at the places `rows`."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: tuple[int, ...]):
        super().__init__(examples)
        self._examples, self._batch_size, self._rows = examples, batch_size, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int):
        batch, place = divmod(index, len(self._rows))
        return self._examples[batch * self._batch_size + self._rows[place]]


def _choose(what, value, names):
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(names)}")


def _open(pairs, image_size, batch_size):
    if not pairs:
        raise ValueError("no data sources are given")
    opened = [
        (sources.open_source(s, image_size) if isinstance(s, str) else s, weight)
        for s, weight in pairs
    ]
    total = sum(weight for _, weight in opened)
    for source, weight in opened:
        if weight <= 0:
            raise ValueError(f"the weight of a data source must be positive, not {weight}")
        if len(source) == 0:
            raise ValueError(f"the data source has no records: {source.identity}")
        if batch_size * weight / total > len(source):
            raise ValueError(
                f"a batch of {batch_size} needs {batch_size * weight / total:.0f} different "
                f"records of a source that has {len(source)}: {source.identity}"
            )
    return opened


def _seed(seed, purpose, number):
    name = f"{seed} {purpose} {number}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "little")


def _place(source, index):
    return source, index


@dataclasses.dataclass(frozen=True)
class _Maker:
    """Turns (source number, record number) into one example; a method per task."""

    sources: tuple
    tokenizer: object
    length: int
    image_size: int
    languages: tuple[str, ...]
    augment: str
    template: str
    rounds: int
    num_image_tokens: int

    def language(self, place, rng):
        """One text: a caption, plain or as in later stages, or a chat without its image."""
        kind = int(rng.integers(4))
        if kind == 3:
            rounds = self._rounds(place, rng)
            ids, _ = conversation.encode_chat(self.tokenizer, "brief", rounds, 0)
            return {"tokens": self._pad(ids, 0)}
        language, caption = self._caption(self._texts(place), rng)
        if kind == 2:
            ids, _ = self._captioning(caption, language)
            return {"tokens": ids}
        wrap = conversation.contrastive_text if kind == 1 else conversation.clean_caption
        return {"tokens": self._ids(wrap(caption))}

    def contrastive(self, place, rng):
        _, caption = self._caption(self._texts(place), rng)
        return {
            "image": self._image(place, rng),
            "text": self._ids(conversation.contrastive_text(caption)),
        }

    def generative(self, place, rng):
        example, caption, language = self._matching(place, rng)
        example["caption"], example["caption_labels"] = self._captioning(caption, language)
        return example

    def retrieval(self, place, rng):
        example, _, _ = self._matching(place, rng)
        # Numbers of different sources must not meet by chance.
        name = f"{place[0]} {self._texts(place)['image_id']}"
        example["image_id"] = np.int32(sources.stable_number(name))
        return example

    def instruct(self, place, rng):
        if self.template == "plain":
            rounds = [("", self._caption(self._texts(place), rng)[1])]
        else:
            # The picture belongs to the first question, wherever the data put its mark.
            (question, answer), *rest = self._rounds(place, rng)
            rounds = [(conversation.image_first(question), answer)]
            rounds += [(q.replace(conversation.IMAGE_MARK, "").strip(), a) for q, a in rest]
        ids, labels = conversation.encode_chat(
            self.tokenizer, self.template, rounds, self.num_image_tokens
        )
        return {
            "image": self._image(place, rng)[None],
            "tokens": self._pad(ids, 0),
            "labels": self._pad(labels, conversation.IGNORE),
        }

    def _matching(self, place, rng):
        texts = self._texts(place)
        language, caption = self._caption(texts, rng)
        example = {
            "image": self._image(place, rng),
            "text": self._ids(conversation.contrastive_text(caption)),
            "positive": self._ids(conversation.clean_caption(caption)),
            "negative": self._ids(self._negative(place, texts, language, rng)),
        }
        return example, caption, language

    def _texts(self, place):
        source, index = place
        return self.sources[source].texts(index)

    def _caption(self, texts, rng):
        captions = texts["captions"]
        languages = [x for x in self.languages if captions.get(x)]
        if not languages:
            raise ValueError(
                f"a record has captions in {sorted(captions) or 'no language'}, but the pipeline "
                f"reads {', '.join(self.languages)}"
            )
        language = languages[int(rng.integers(len(languages)))]
        return language, captions[language][int(rng.integers(len(captions[language])))]

    def _negative(self, place, texts, language, rng):
        """A caption in the same language of another image that is not described alike."""
        source = self.sources[place[0]]
        own = set(texts["captions"][language])
        for _ in range(100):
            other = source.texts(int(rng.integers(len(source))))
            captions = other["captions"].get(language)
            if captions and other["image_id"] != texts["image_id"] and own.isdisjoint(captions):
                caption = captions[int(rng.integers(len(captions)))]
                return conversation.clean_caption(caption)
        raise ValueError(
            f"found no second caption in {language!r} in {source.identity}; matching needs "
            "images with different captions"
        )

    def _rounds(self, place, rng):
        """A user's conversation as it is, or questions drawn in one language."""
        whole = self._texts(place).get("rounds")
        if whole:
            return list(whole)
        qa = self.sources[place[0]].questions(place[1])
        languages = [x for x in self.languages if any(x == entry[0] for entry in qa)]
        if not languages:
            raise ValueError(
                "a record has neither a conversation nor questions in "
                f"{', '.join(self.languages)}; this task needs one"
            )
        language = languages[int(rng.integers(len(languages)))]
        pairs = [entry[1:] for entry in qa if entry[0] == language]
        return [pairs[i] for i in rng.permutation(len(pairs))[: self.rounds]]

    def _image(self, place, rng):
        source, index = place
        pixels = self.sources[source].image(index)
        if self.augment != "none":
            pixels = image.random_resized_crop(Image.fromarray(pixels), self.image_size, rng)
            mirrored = self.augment.endswith("flip") and rng.random() < 0.5
            return pixels[:, ::-1] if mirrored else pixels
        if pixels.shape[:2] == (self.image_size, self.image_size):
            return pixels
        return image.square(Image.fromarray(pixels), self.image_size)

    def _captioning(self, caption, language):
        return conversation.captioning_example(self.tokenizer, caption, language, self.length)

    def _ids(self, sentence):
        return self.tokenizer.encode_batch([sentence], self.length)[0]

    def _pad(self, ids, value):
        row = np.full(self.length, value, np.int32)
        row[: len(ids)] = ids[: self.length]
        return row
