"""Folders of images, a folder per class, as ImageNet is kept."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import base, index

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif"}
ROW = np.dtype([("end", "<u8"), ("class", "<u4")])  # of a name in the block of them; its folder
KEPT_FROM = 16 * 2**20  # bytes of names; fewer are listed again each time
_PART = 1 << 20


class ImageFolder(base.Source):
    """<root>/<class>/*.jpg; the caption of an image is "a photo of a <class>".

    names: a file with the name of each class, a line per folder in the order of the folders'
    names; by default the folders' names with spaces for "_" and "-". Texts also hold
    "class_index", the number of the folder.
    """

    def __init__(self, root: str | os.PathLike, names: str = "", language: str = "en"):
        self.root, self.language = os.fspath(root).rstrip("/"), language
        if not os.path.isdir(self.root):
            raise ValueError(f"no folder at {self.root}")
        folders = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        self.names = [name.replace("_", " ").replace("-", " ") for name in folders]
        if names:
            lines = files.read(names).decode().splitlines()
            self.names = [line.strip() for line in lines if line.strip()]
            if len(self.names) != len(folders):
                raise ValueError(
                    f"{names} has {len(self.names)} names, but {self.root} has {len(folders)} "
                    "folders"
                )
        self._rows, self._block, self._place = _listed(self.root, folders)

    def __getstate__(self):
        # What is mapped is found again in the cache folder.
        kept = isinstance(self._rows, np.memmap)
        return {k: v for k, v in self.__dict__.items() if not (kept and k in ("_rows", "_block"))}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if "_rows" not in state:
            self._rows, self._block = _mapped(state["_place"])

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(self._block), _PART):
            digest.update(self._block[start : start + _PART])
        digest.update("\n".join(self.names).encode())
        return f"folder {os.path.basename(self.root)} {len(self)} {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return f"{self.root}/{self._name(index)}"

    def _name(self, index):
        start = int(self._rows["end"][index - 1]) if index else 0
        return self._block[start : int(self._rows["end"][index])].tobytes().decode()

    def image_in(self, handle: int) -> bytes:
        try:
            return files.read(self.place(handle))
        except OSError as error:
            raise RecordError("missing_image", error.strerror or str(error)) from error

    def texts_in(self, handle: int) -> dict:
        number = int(self._rows["class"][handle])
        return {
            "image_id": base.stable_number(self._name(handle)),
            "captions": {self.language: (f"a photo of a {self.names[number]}",)},
            "class_index": number,
        }


def _is_image(name):
    return os.path.splitext(name)[1].lower() in ENDINGS


def _listed(root: str, folders: Sequence[str]) -> tuple[np.ndarray, np.ndarray, pathlib.Path]:
    """(rows, the names "folder/file" after one another, where they are kept if mapped).

    The names of one folder at a time are in memory, and all of them only where they are few.
    """
    times = [os.stat(f"{root}/{folder}").st_mtime_ns for folder in folders]
    about = json.dumps([os.path.abspath(root), list(zip(folders, times, strict=True))])
    place = files.cache_folder() / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.names"
    if place.exists():
        return *_mapped(place), place
    rows, end = index.Rows(ROW), 0
    with tempfile.TemporaryFile() as names:
        for number, folder in enumerate(folders):
            with os.scandir(f"{root}/{folder}") as entries:
                found = sorted(e.name for e in entries if _is_image(e.name))
            for name in found:
                end += names.write(f"{folder}/{name}".encode())
                rows.append((end, number))
        names.seek(0)
        if end < KEPT_FROM:
            return rows.array(), np.frombuffer(names.read(), np.uint8), place
        with index.whole_file(str(place.with_suffix(".npy"))) as file:
            np.save(file, rows.array())
        with index.whole_file(str(place)) as file:  # last: its presence tells that both are whole
            shutil.copyfileobj(names, file, _PART)
    return *_mapped(place), place


def _mapped(place: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    rows = np.load(place.with_suffix(".npy"), mmap_mode="r")
    return rows, np.memmap(place, np.uint8, "r")
