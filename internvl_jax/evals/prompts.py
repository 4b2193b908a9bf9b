"""Class names and templates of zero-shot classification.

The published numbers use those of CLIP_benchmark: they are read from that package where it is
installed (its files only: nothing of it is imported). Without it the project's own templates
stand in; `Prompts.source` says which, and figures made with the own ones are not comparable.
"""

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_jax.evals.files import DatasetError

# The languages of the paper's Table 6b, and the names that CLIP_benchmark's files have for them.
LANGUAGES = {"en": "en", "zh": "cn", "ja": "jp", "ar": "ar", "it": "it"}
OWN = {
    "en": ("a photo of {c}", "a picture showing {c}", "an image of one {c}", "a drawing of {c}"),
    "zh": ("{c}的照片", "一张{c}的图片", "一幅{c}的画"),
    "ja": ("{c}の写真", "{c}の画像", "{c}の絵"),
    "ar": ("صورة {c}", "رسم {c}"),
    "it": ("una foto di {c}", "un'immagine di {c}", "un disegno di {c}"),
}
# Sets that CLIP_benchmark has no templates of: those of CLIP (openai/CLIP, data/prompts.md).
CLIP = {"birdsnap": ("a photo of a {c}, a type of bird.",)}
WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Prompts:
    """Prompts of each class; `source` names the templates: CLIP_benchmark's or our own."""

    classes: list[str]
    texts: list[list[str]]
    source: str


@functools.cache
def package() -> Path | None:
    """The folder of CLIP_benchmark's data files, or None where it is not installed."""
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations))) / "datasets"


@functools.cache
def _file(kind: str, language: str) -> dict[str, list[str]]:
    folder = package()
    if folder is None:
        return {}
    path = folder / f"{LANGUAGES[language]}_{kind}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def build(dataset: str, language: str, folders: Sequence[str]) -> Prompts:
    """Prompts of a data set's classes.

    Args:
        dataset: CLIP_benchmark's name, as in its files of templates and class names.
        folders: names that came with the data: folders or the lines of classnames.txt.

    Raises:
        DatasetError: a language or class names that nothing gives.
    """
    if language not in LANGUAGES:
        raise DatasetError(f"no prompts in {language!r}; there are {', '.join(LANGUAGES)}")
    classes = _class_names(dataset, language, folders)
    known = _file("zeroshot_classification_templates", language)
    if language == "en" and dataset in CLIP:
        templates, origin = CLIP[dataset], "CLIP, {} templates"
    elif known:
        templates = known.get(dataset) or known["imagenet1k"]
        origin = "CLIP_benchmark, {} templates"
    else:
        templates = OWN[language]
        origin = "own, {} templates; not comparable with published figures"
    source = origin.format(len(templates))
    return Prompts(classes, [[t.format(c=name) for t in templates] for name in classes], source)


def _class_names(dataset: str, language: str, folders: Sequence[str]) -> list[str]:
    named = _file("classnames", language)
    if all(WNID.fullmatch(name) for name in folders):
        numbers = imagenet_classes(folders)
        names = named.get("imagenet1k")
        if names:
            return [names[number] for number in numbers]
        raise DatasetError(
            f"class names of {dataset} in {language!r} come with CLIP_benchmark: "
            "pip install --no-deps clip-benchmark"
        )
    numbered = all(name.isdecimal() for name in folders)  # as those of ImageNet-V2
    if dataset == "imagenet1k" and numbered and dataset in named:
        return [named["imagenet1k"][int(name)] for name in folders]
    if len(named.get(dataset, ())) == len(folders):
        return named[dataset]
    if language != "en":
        raise DatasetError(f"there are no class names of {dataset} in {language!r}")
    return [name.replace("_", " ").replace("/", " ") for name in folders]


@functools.cache
def _wnids() -> tuple[str, ...]:
    folder = package()
    if folder is None:
        return ()
    for node in ast.parse((folder / "builder.py").read_text("utf-8")).body:
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if "all_imagenet_wordnet_ids" in names:
            return tuple(ast.literal_eval(node.value))
    return ()


def imagenet_classes(folders: Sequence[str], known: Sequence[str] | None = None) -> list[int]:
    """Numbers among ImageNet's 1000 classes of folders named by WordNet id.

    known: the sorted ids of all classes; without them those of a complete set, or CLIP_benchmark's.
    ImageNet-A and -R hold 200 of the classes, and only these compete there.
    """
    known = known or (sorted(folders) if len(folders) == 1000 else _wnids())
    position = {wnid: number for number, wnid in enumerate(known)}
    unknown = [name for name in folders if name not in position]
    if unknown:
        raise DatasetError(
            f"{len(unknown)} of {len(folders)} class folders are none of ImageNet-1K's "
            f"{len(known)} known ids, the first {unknown[0]}; "
            "the list comes with CLIP_benchmark: pip install --no-deps clip-benchmark"
        )
    return [position[name] for name in folders]
