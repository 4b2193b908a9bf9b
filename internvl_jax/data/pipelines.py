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
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from internvl_jax.data import conversation, pictures, stream, text
from internvl_jax.data import sources as formats
from internvl_jax.data.packing import PackedBatches, row_squares
from internvl_jax.data.tasks import AUGMENTATIONS, TASKS, Maker

_VERSION = 2  # raise it when the order or the content of batches changes


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches, or those rows of them that one process needs.

    batches: batch number → (dict of arrays, what was skipped for it), endless.
    places: example number → (source number, record number). sources: what they number.
    content: everything that decides the batches; fingerprint: its sha256, to be stored with a
    checkpoint. records: size of all sources together. reading: options of `stream.Reader`.
    """

    batches: stream.Batches
    places: grain.MapDataset
    sources: tuple[formats.Source, ...]
    content: Mapping[str, Any]
    records: int
    reading: Mapping[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch number `step`, computed here and now."""
        return self.batches[step][0]

    def ids(self, step: int) -> list[str]:
        """Which record each row of a batch is planned to hold, as "SOURCE:RECORD" numbers.

        A record that turns out bad when it is read is replaced; see `stream.Batches`.
        """
        return self.batches.ids(step)

    def place(self, name: str) -> str:
        """Where the record of an id lies, or the records of a packed row's."""
        places = []
        for record in filter(None, name.split("+")):
            source, index = (int(number) for number in record.split(":"))
            places.append(self.sources[source].place(index))
        return "; ".join(places)

    def iterate_ids(self, start_step: int = 0) -> stream.Reader:
        """The ids of batches alone (`stream.Ids`), by the same readers."""
        return stream.Reader(stream.Ids(self.batches), start_step, **self.reading)

    def iterate(self, start_step: int = 0) -> stream.Reader:
        """Batches from `start_step` on, prepared ahead. Close the iterator after use."""
        return stream.Reader(self.batches, start_step, **self.reading)


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
    max_tiles: int = 1,
    packing: int = 0,
    packed_squares: int = 0,
    decoder: str = "exact",
    crop_scale: tuple[float, float] = (0.5, 1.0),
    workers: int = 0,
    max_bad_fraction: float = 1e-3,
    timeout: float = 600.0,
    rows: Sequence[int] | None = None,
) -> Pipeline:
    """Builds the pipeline of a training task.

    sources: (source or name for `sources.open_source`, weight) pairs; every batch holds them in
        the proportion of the weights.
    batch_size: of the global batch. text_length: of every text field; for "instruct" it counts
        the image tokens.
    languages: each example draws one of them.
    augment: one of AUGMENTATIONS; crop_scale: limits of a random crop's share of the area.
    decoder: one of `pictures.DECODERS`.
    template, rounds, num_image_tokens, max_tiles: for "instruct", the chat template, questions per
        example, tokens that stand for a square, and squares that an image is cut into at most.
    packing: for "instruct", how many conversations a row holds on average (`packing`); 0: one each.
        packed_squares: room for squares in such a row; 0: as if every conversation used its own.
    workers: processes that make batches, 0 for threads of this one. max_bad_fraction, timeout: see
        `stream.Reader`. Neither these nor `rows` change what a batch holds.
    rows: those of every batch to make, in this order; None for all.

    Raises ValueError on unknown names, an empty source, and a batch larger than the data.
    """
    _choose("task", task, TASKS)
    _choose("augment", augment, AUGMENTATIONS)
    _choose("decoder", decoder, pictures.DECODERS)
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
    if packing and task != "instruct":
        raise ValueError(f"data.packing puts conversations together; the task {task!r} has none")
    opened = _open(sources, image_size, batch_size * max(1, packing))
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
        max_tiles=max_tiles,
        decoder=decoder,
        crop_scale=list(crop_scale),
    )
    make = Maker(
        task=task,
        sources=tuple(source for source, _ in opened),
        tokenizer=tokenizer,
        length=text_length,
        image_size=image_size,
        languages=tuple(languages),
        augment=augment,
        template=template,
        rounds=rounds,
        num_image_tokens=num_image_tokens,
        max_tiles=max_tiles,
        decoder=decoder,
        scale=tuple(crop_scale),
    )
    if packing:
        settings |= dict(packing=packing, packed_squares=packed_squares)
    parts = [
        grain.MapDataset.range(len(source))
        .shuffle(seed=_seed(seed, "order", k))
        .repeat()
        .map(functools.partial(_place, k))
        for k, (source, _) in enumerate(opened)
    ]
    places = grain.MapDataset.mix(parts, [weight for _, weight in opened])
    rows = range(batch_size) if rows is None else rows
    random = _seed(seed, "examples", 0)
    if packing:
        squares = row_squares(max_tiles, packing, packed_squares)
        if squares < make.tiles_in_all:
            raise ValueError(
                f"data.packed_squares {packed_squares} is less than one conversation may need, "
                f"{make.tiles_in_all}"
            )
        batches = PackedBatches(
            places, make.sources, make.conversation, batch_size, rows, random,
            conversations=packing, length=text_length, squares=squares, image_size=image_size,
        )
    else:
        batches = stream.Batches(places, make.sources, make, batch_size, rows, random)
    content = dict(
        version=_VERSION,
        settings=settings,
        sources={str(k): [source.identity, weight] for k, (source, weight) in enumerate(opened)},
        tokenizer=tokenizer.digest,
    )
    return Pipeline(
        batches,
        places,
        make.sources,
        json.loads(json.dumps(content)),
        sum(len(source) for source in make.sources),
        dict(workers=workers, max_bad_fraction=max_bad_fraction, timeout=timeout),
    )


def _choose(what, value, names):
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(names)}")


def _open(pairs, image_size, batch_size):
    if not pairs:
        raise ValueError("no data sources are given")
    opened = [
        (formats.open_source(s, image_size) if isinstance(s, str) else s, weight)
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
