"""Records that are one tf.train.Example each: TFRecord files, ArrayRecord files, cached parquet."""

import functools
import hashlib
import os
import struct
from collections.abc import Collection, Sequence

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import base, example_proto, index

VERSION = "tfrecord 1"
ROW = np.dtype([("at", "<u8"), ("size", "<u8")])
_HEADER = 12  # length and its checksum, before the data; a checksum of the data follows it


class _Examples(base.Source):
    """What is made of an Example: its image and texts, under the names of `base`."""

    language, caption = "en", ""

    def image_in(self, handle: "_Blob") -> bytes:
        names = handle.names()
        for key in base.IMAGE_KEYS:
            if key in names and (found := handle.only_bytes(key)):
                return found
        raise RecordError("missing_image", f"no image among {', '.join(sorted(names)) or 'none'}")

    def texts_in(self, handle: "_Blob") -> dict:
        record = {}
        for name in handle.names():
            if name not in base.IMAGE_KEYS and (found := handle.values(name)):
                record[name] = found[0] if len(found) == 1 else found
        return base.texts_of(record, handle.name, self.language, self.caption)

    def metadata_in(self, handle: "_Blob") -> dict:
        found = {}
        for name in handle.names():
            if name not in base.IMAGE_KEYS and (given := handle.values(name)):
                found[name] = given[0]
        return {**(base.parsed_json(found["json"]) if "json" in found else {}), **found}


class _Blob:
    """The bytes of one record; its features are found when first asked for."""

    __slots__ = ("_data", "_spans", "name")

    def __init__(self, data: bytes, name: str):
        self._data, self._spans, self.name = data, None, name

    def names(self) -> Collection[str]:
        if self._spans is None:
            self._data, self._spans = example_proto.spans(self._data)
        return self._spans

    def values(self, name: str) -> list:
        start, stop = self._spans[name]
        return example_proto.values(self._data[start:stop])

    def only_bytes(self, name: str) -> bytes | None:
        return example_proto.only_bytes(self._data, *self._spans[name])


class TfRecords(index.Indexed, _Examples):
    """TFRecord files through an index of their frames; the checksum of each record is checked.

    pattern: see `files.expand`. Compressed files have no random access and are refused.
    """

    def __init__(self, pattern: str, language: str = "en", caption: str = ""):
        super().__init__("tfrecord", pattern, scan, VERSION, language, caption)

    def place(self, index: int) -> str:
        path, number = self.index.file_of(index)
        return f"{path}: record {number}"

    def fetch(self, indices: Sequence[int]) -> list:
        return [self._read(i) for i in indices]

    def _read(self, number):
        path, place = self.index.file_of(number)
        offset, size = (int(x) for x in self.index.rows[number])
        data = files.read(path, offset, size + 4)
        if len(data) < size + 4:
            return RecordError("truncated", "the file ends inside the record")
        data, checksum = data[:size], data[size:]
        if _masked(data) != checksum:
            return RecordError("corrupt_record", "the record's checksum does not hold")
        return _Blob(data, f"{path.rpartition('/')[2]} {place}")


def scan(path: str) -> index.Scan:
    """Finds the frames of a TFRecord file."""
    length = files.size(path)
    rows, problems, position = [], [], 0
    digest = hashlib.sha256()
    if files.read(path, 0, 2) == b"\x1f\x8b":
        raise ValueError(f"{path} is compressed; decompress it, since gzip has no random access")
    while position < length:
        header = files.read(path, position, _HEADER)
        if len(header) < _HEADER or position + _HEADER > length:
            problems.append(("truncated", f"the file ends inside a frame at byte {position}"))
            break
        if _masked(header[:8]) != header[8:]:
            problems.append(("corrupt_record", f"no frame at byte {position}"))
            break
        (size,) = struct.unpack("<Q", header[:8])
        rows.append((position + _HEADER, size))
        position += _HEADER + size + 4
        digest.update(header)
    return index.Scan(np.array(rows, ROW), digest.hexdigest(), tuple(problems))


def frame(data: bytes) -> bytes:
    """A record as it stands in a TFRecord file."""
    header = struct.pack("<Q", len(data))
    return header + _masked(header) + data + _masked(data)


def _masked(data):
    """The format's checksum: CRC-32C, rotated and shifted so that it may be summed itself."""
    value = _crc32c()(data)
    value = ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", value)


@functools.cache
def _crc32c():
    try:
        import google_crc32c
    except ImportError as error:
        raise ImportError(
            "TFRecord and parquet need google-crc32c: pip install 'internvl-jax[data]'"
        ) from error
    return google_crc32c.value


class ArrayRecords(_Examples):
    """ArrayRecord files of Examples; the records of a batch are read together.

    pattern: see `files.expand`. The library reads local files only: mount or copy a bucket.
    """

    def __init__(self, pattern: str, language: str = "en", caption: str = ""):
        self.paths = files.expand(pattern)
        self.language, self.caption = language, caption
        for path in self.paths:
            if files.is_remote(path):
                raise ValueError(f"{path}: ArrayRecord files are read from a local path only")
            if not files.exists(path):
                raise ValueError(f"no data file at {path}")
        self._open()

    def _open(self):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            self._data = ArrayRecordDataSource(self.paths)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot open {self.paths[0]} …: {error}") from error

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_data"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            size = files.size(path)
            # The end of a file holds its index, so it changes with any record's size.
            digest.update(f"{os.path.basename(path)} {size}".encode())
            digest.update(files.read(path, max(0, size - 65536)))
        name = os.path.basename(self.paths[0])
        how = f" {self.language} {self.caption}".rstrip()
        return f"arrayrecord {name} {len(self)} {digest.hexdigest()}{how}"

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Sequence[int]) -> list:
        try:
            blobs = self._data.__getitems__(list(indices)) if len(indices) else []
        except RuntimeError as error:
            if len(indices) == 1:
                return [RecordError("corrupt_record", " ".join(str(error).split())[:200])]
            return [handle for i in indices for handle in self.fetch([i])]
        return [_Blob(blob, str(i)) for i, blob in zip(indices, blobs, strict=True)]

    def place(self, index: int) -> str:
        return f"{self.paths[0]}{' …' if len(self.paths) > 1 else ''}: record {index}"
