"""Random-access sources of examples, a file per format, behind the interface `base.Source`.

A source has `len(source)`, `source[i]` and `source.identity`, a string that changes when its
content changes. An example is a dict, whose parts can also be read alone:

    source.image(i)      "image"      uint8 [H, W, 3]
    source.texts(i)      "image_id"   int; examples that share it match each other in retrieval
                         "captions"   {language: tuple of captions}, the canonical one first
                         "rounds"     tuple of (question, answer), a user's whole conversation
                         "color", "shape", "class_index"   where the example has them
    source.questions(i)  "qa"         tuple of (language, question, answer)

Pipelines read by handles (`fetch`, `image_in`, `texts_in`), which leaves images encoded.
"""

import inspect
import os
from collections.abc import Callable
from urllib.parse import parse_qsl

from internvl_jax.data.sources.base import Source, stable_number
from internvl_jax.data.sources.combined import Concatenated, Selected, chat_mixture
from internvl_jax.data.sources.embedded import SCENE_COUNTS, EmbeddedDigits, EmbeddedScenes
from internvl_jax.data.sources.examples import ArrayRecords, TfRecords
from internvl_jax.data.sources.folder import ImageFolder
from internvl_jax.data.sources.parquet import open_parquet
from internvl_jax.data.sources.tables import CsvImages, JsonImages, JsonlImages
from internvl_jax.data.sources.tar import WebDataset
from internvl_jax.data.sources.tfds import TfdsImages


def _tfds(name: str, split: str = "train", data_dir: str = "", **captions: str) -> TfdsImages:
    """caption_<language>=<feature> for each caption; "caption" is taken for English."""
    features = {key.removeprefix("caption_"): name for key, name in captions.items()}
    return TfdsImages(name, split, features or {"en": "caption"}, data_dir=data_dir or None)


FORMATS: dict[str, Callable[..., Source]] = {
    "webdataset": WebDataset,
    "tfrecord": TfRecords,
    "arrayrecord": ArrayRecords,
    "parquet": open_parquet,
    "jsonl": JsonlImages,
    "json": JsonImages,
    "csv": CsvImages,
    "chat": chat_mixture,
    "folder": ImageFolder,
    "tfds": _tfds,
}
EMBEDDED = ("scenes", "digits")
ENDINGS = {
    ".tar": "webdataset",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".array_record": "arrayrecord",
    ".arrayrecord": "arrayrecord",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
}

__all__ = [
    "EMBEDDED",
    "FORMATS",
    "SCENE_COUNTS",
    "ArrayRecords",
    "Concatenated",
    "CsvImages",
    "EmbeddedDigits",
    "EmbeddedScenes",
    "ImageFolder",
    "JsonImages",
    "JsonlImages",
    "Selected",
    "Source",
    "TfRecords",
    "TfdsImages",
    "WebDataset",
    "chat_mixture",
    "open_source",
    "spec_of",
    "stable_number",
]


def spec_of(path: str) -> str:
    """The name for `open_source` of a file or folder, by its ending; a name stands for itself."""
    kind, colon, _ = path.partition(":")
    if (colon and kind in FORMATS) or path.partition("/")[0] in EMBEDDED:
        return path
    bare = path.partition("?")[0] if "=" in path else path
    for ending, kind in ENDINGS.items():
        if bare.rstrip("]}*").endswith(ending) or f"{ending}-" in bare.rpartition("/")[2]:
            return f"{kind}:{path}"
    if os.path.isdir(bare):
        return f"folder:{path}"
    raise ValueError(
        f"the format of {path} is not known by its ending; write FORMAT:{path} with one of "
        f"{', '.join(FORMATS)}"
    )


def open_source(spec: str, image_size: int = 0) -> Source:
    """Opens a source by its name in a config: FORMAT:PATH, with ?option=value&… behind it.

    "scenes" and "digits" are the embedded sets, "scenes/test" another split of one, rendered at
    `image_size`. Every format takes the option `keep`, an index list (`combined.Selected`); the
    others are the arguments of the format's class: language, caption, root, split, names.
    """
    kind, colon, rest = spec.partition(":")
    if colon and rest and kind in FORMATS:
        path, mark, query = rest.partition("?")
        if mark and "=" not in query:  # the ? of a file pattern
            path, query = rest, ""
        options = dict(parse_qsl(query))
        keep = options.pop("keep", None)
        make = FORMATS[kind]
        try:
            inspect.signature(make).bind(path, **options)
        except TypeError as error:
            known = ", ".join(list(inspect.signature(make).parameters)[1:])
            raise ValueError(f"data source {spec!r}: {error}; {kind} takes {known}, keep") from None
        source = make(path, **options)
        return Selected(source, keep) if keep else source
    name, _, split = spec.partition("/")
    if name == "scenes":
        return EmbeddedScenes(split or "train", image_size=image_size)
    if name == "digits":
        return EmbeddedDigits(split or "train", image_size)
    known = ", ".join([*EMBEDDED, *(f"{kind}:PATH" for kind in FORMATS)])
    raise ValueError(f"unknown data source {spec!r}; use one of {known}")
