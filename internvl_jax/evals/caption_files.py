"""Readers of pictures with captions, as the sets' makers, Karpathy and CLIP_benchmark have them.

Each of the sets' readers takes the root of all data sets and a language.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from internvl_jax.evals.files import SUFFIXES, DatasetError, Place, first, need, tar_samples

Captioned = tuple[list[Place], list[list[str]]]


def tar_captions(folder: Path) -> Captioned:
    """A retrieval set of CLIP_benchmark's tar files: places and each picture's captions."""
    samples = list(tar_samples(folder / "test"))
    captions = [s["txt"].decode().strip("\n").split("\n") for s in samples]
    return [s["image"] for s in samples], captions


def karpathy(file: Path, images: Path, split: str = "test") -> Captioned:
    """Karpathy's JSON (`dataset_flickr30k.json`, `dataset_coco.json`) and the picture folder."""
    records = json.loads(need(file, "Karpathy's splits").read_text("utf-8"))["images"]
    chosen = [r for r in records if r["split"] == split]
    places = [
        Place(images / r.get("filepath", "") / r["filename"], name=str(r.get("cocoid", "")))
        for r in chosen
    ]
    return places, [[s["raw"] for s in r["sentences"]] for r in chosen]


def comma_lines(file: Path, images: Path) -> Captioned:
    """CLIP_benchmark's `<set>_<split>_<lang>.txt`: a header, then lines `name.jpg,caption`."""
    found: dict[str, list[str]] = {}
    lines = need(file, "the captions").read_text("utf-8").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            name, mark, caption = line.strip().partition(".jpg,")
            if not mark:
                raise DatasetError(f"{file}:{number}: expected name.jpg,caption")
            found.setdefault(name, []).append(caption)
    return [Place(images / f"{name}.jpg") for name in found], list(found.values())


def tab_lines(file: Path, folders: Sequence[Path], split: Path | None = None) -> Captioned:
    """COCO-CN: lines of a name, a tab and a caption. `name#zhm#0` is name; without suffix .jpg.

    split: a file with the names that count, one a line; None: all.
    """
    found: dict[str, list[str]] = {}
    if split is not None:
        names = need(split, "the list of pictures").read_text("utf-8").split()
        found = {_picture_name(name): [] for name in names}
    for number, line in enumerate(need(file, "the captions").read_text("utf-8").splitlines(), 1):
        if line.strip():
            name, mark, caption = line.strip().partition("\t")
            if not mark:
                raise DatasetError(f"{file}:{number}: expected a name, a tab and a caption")
            name = _picture_name(name.partition("#")[0])
            if split is None or name in found:
                found.setdefault(name, []).append(caption)
    silent = [name for name, own in found.items() if not own]
    if silent:
        raise DatasetError(f"{file} has no caption of {len(silent)} pictures: {silent[0]}")
    return [_in_one_of(folders, name) for name in found], list(found.values())


def _picture_name(name: str) -> str:
    return name if Path(name).suffix.lower() in SUFFIXES else f"{name}.jpg"


def _in_one_of(folders: Sequence[Path], name: str) -> Place:
    return Place(first([folder / name for folder in folders]))


def name_and_caption_files(names: Path, captions: Path, folders: Sequence[Path]) -> Captioned:
    """XTD10: a line per picture in each of two files."""
    listed = need(names, "the list of pictures").read_text("utf-8").splitlines()
    written = need(captions, "the captions").read_text("utf-8").splitlines()
    if len(listed) != len(written):
        raise DatasetError(f"{names} has {len(listed)} lines but {captions} has {len(written)}")
    return [_in_one_of(folders, name.strip()) for name in listed], [[one] for one in written]


def coco_captions(file: Path, images: Path) -> Captioned:
    """COCO's caption JSON ("images", "annotations"), also of NoCaps."""
    data = json.loads(need(file, "the captions").read_text("utf-8"))
    groups: dict[int, list[str]] = {record["id"]: [] for record in data["images"]}
    for annotation in data["annotations"]:
        groups[annotation["image_id"]].append(annotation["caption"])
    places = [Place(images / r["file_name"], name=str(r["id"])) for r in data["images"]]
    return places, list(groups.values())


def flickr(root: Path, language: str) -> Captioned:
    """Flickr30K: the tar files, or Karpathy's splits, or CLIP_benchmark's lines."""
    folder = root / "flickr30k"
    if (root / "wds_flickr30k").is_dir():
        return tar_captions(root / "wds_flickr30k")
    if (folder / "dataset_flickr30k.json").is_file():
        return karpathy(folder / "dataset_flickr30k.json", _flickr_pictures(folder))
    return comma_lines(folder / "flickr30k_test_karpathy.txt", _flickr_pictures(folder))


def _flickr_pictures(folder: Path) -> Path:
    return first([folder / "Images", folder / "flickr30k-images"])


def coco(root: Path, language: str) -> Captioned:
    """COCO: the tar files, or Karpathy's splits."""
    if (root / "wds_mscoco_captions").is_dir():
        return tar_captions(root / "wds_mscoco_captions")
    return karpathy(root / "coco" / "dataset_coco.json", root / "coco")


def xtd(root: Path, language: str) -> Captioned:
    """XTD10: as its makers have it, or all in one folder."""
    folder, code = root / "xtd", {"ja": "jp"}.get(language, language)
    places = [folder / part for part in ("", "XTD10", "MIC", "STAIR")]
    return name_and_caption_files(
        first([place / "test_image_names.txt" for place in places]),
        first([place / f"test_1kcaptions_{code}.txt" for place in places]),
        _folders_of(root, "xtd"),
    )


def _folders_of(root: Path, name: str) -> list[Path]:
    """Folders that may have the pictures of a set made from COCO."""
    return [root / name / "images", root / "coco/val2014", root / "coco/train2014"]


def flickr_cn(root: Path, language: str) -> Captioned:
    """Flickr30K-CN: CLIP_benchmark's lines."""
    folder = root / "flickr30k"
    return comma_lines(folder / "flickr30k_test_zh.txt", _flickr_pictures(folder))


def coco_cn(root: Path, language: str) -> Captioned:
    """COCO-CN: as its makers have it, or lines of the test split alone."""
    folder = root / "coco-cn"
    written = folder / "imageid.human-written-caption.txt"  # of all splits
    split = folder / "coco-cn_test.txt"
    if written.is_file():
        return tab_lines(written, _folders_of(root, "coco-cn"), split)
    return tab_lines(split, _folders_of(root, "coco-cn"))


def nocaps(root: Path, language: str) -> Captioned:
    """NoCaps: its validation split."""
    folder = root / "nocaps"
    return coco_captions(folder / "nocaps_val_4500_captions.json", folder / "val")
