"""Folders of images, a folder per class, as ImageNet is kept."""

import functools
import hashlib
import os

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import base

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif"}


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
        # Names lie in one block of bytes, so that millions of them cost little more than that.
        block, ends, classes = bytearray(), [], []
        for number, folder in enumerate(folders):
            entries = os.scandir(f"{self.root}/{folder}")
            for name in sorted(e.name for e in entries if _is_image(e.name)):
                block += f"{folder}/{name}".encode()
                ends.append(len(block))
                classes.append(number)
        self._block, self._ends = bytes(block), np.array(ends, np.uint64)
        self._classes = np.array(classes, np.int32)

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256(self._block)
        digest.update("\n".join(self.names).encode())
        return f"folder {os.path.basename(self.root)} {len(self)} {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._classes)

    def place(self, index: int) -> str:
        return f"{self.root}/{self._name(index)}"

    def _name(self, index):
        start = int(self._ends[index - 1]) if index else 0
        return self._block[start : int(self._ends[index])].decode()

    def image_in(self, handle: int) -> bytes:
        try:
            return files.read(self.place(handle))
        except OSError as error:
            raise RecordError("missing_image", error.strerror or str(error)) from error

    def texts_in(self, handle: int) -> dict:
        number = int(self._classes[handle])
        return {
            "image_id": base.stable_number(self._name(handle)),
            "captions": {self.language: (f"a photo of a {self.names[number]}",)},
            "class_index": number,
        }


def _is_image(name):
    return os.path.splitext(name)[1].lower() in ENDINGS
