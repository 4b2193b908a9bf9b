"""Pictures and files of records for the tests of the data."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Indices of the tests do not land in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def encoded(number: int, kind: str = "JPEG", size=(40, 30)) -> bytes:
    """A picture that is another one for every number."""
    rng = np.random.default_rng(number)
    low = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    file = io.BytesIO()
    low.resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    """members: (name, bytes) pairs."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder, shards: int, records: int):
    """Tars as img2dataset writes them; returns their pattern."""
    for shard in range(shards):
        members = []
        for record in range(records):
            key, number = f"{shard:05d}{record:04d}", shard * records + record
            about = {"caption": f"picture {number}", "key": key, "similarity": 0.3}
            members += [
                (f"{key}.jpg", encoded(number)),
                (f"{key}.txt", f"picture {number}".encode()),
                (f"{key}.json", json.dumps(about).encode()),
            ]
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"


@pytest.fixture
def make():
    """The functions of this file, which tests cannot import."""

    class Make:
        picture = staticmethod(encoded)
        tar = staticmethod(write_tar)
        shards = staticmethod(write_shards)

    return Make
