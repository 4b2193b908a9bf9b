"""WebDataset tars (img2dataset's "webdataset" output) read in place and in any order.

The headers of a tar are scanned once for where each member lies; a record is then one `pread` per
part. Nothing is ever extracted to disk. Members with one name up to the first dot, one after
another, are one record: an image, and a caption (.txt) or, where there is none, metadata (.json,
with "caption" or "conversations").
"""

import hashlib
import os
from collections.abc import Iterator

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import base, index

VERSION = "tar 1"
IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "ppm"}
TEXTS = {"txt", "caption", "text"}
_BLOCK = 512
_REMOTE_BLOCK = 8 * 2**20  # bytes per request when the headers of a remote tar are scanned
# Offset and size of each part; size 0 stands for none, of an empty text as well.
_PARTS = ("image", "text", "json")
ROW = np.dtype(
    [(f"{part}_{what}", kind) for part in _PARTS
     for what, kind in (("at", "<u8"), ("size", "<u4"))]
)


class WebDataset(index.Indexed):
    """Records of tars. pattern: see `files.expand`. language: of plain captions.

    caption: the key of the metadata to take captions from in place of the .txt.
    """

    def __init__(self, pattern: str, language: str = "en", caption: str = ""):
        super().__init__("webdataset", pattern, scan, VERSION, language, caption)

    def place(self, index: int) -> str:
        path, number = self.index.file_of(index)
        row = self.index.rows[index]
        parts = [int(row[f"{part}_at"]) for part in ("image", "text", "json")]
        at = min((p for p in parts if p), default=None)
        name = "" if at is None else _member_name(path, at)
        return f"{path}: record {number}{name and f' ({name})'}"

    def image_in(self, handle: int) -> bytes:
        data = self._part(handle, "image")
        if not data:
            raise RecordError("missing_image", "the record has no image member")
        return data

    def texts_in(self, handle: int) -> dict:
        _, _, text_at, _, json_at, _ = self.index.rows[handle].item()
        if text_at and not self.caption:
            record = {"caption": self._part(handle, "text")}
        elif json_at:
            record = {"json": self._part(handle, "json")}
        else:
            self._part(handle, "image")  # in a tar that ends too early, that is what is wrong
            raise RecordError("missing_text", "the record has no .txt or .json member")
        path, number = self.index.file_of(handle)
        name = f"{path.rpartition('/')[2]} {number}"
        return base.texts_of(record, name, self.language, self.caption)

    def metadata_in(self, handle: int) -> dict:
        data = self._part(handle, "json")
        return base.parsed_json(data) if data else {}

    def _part(self, handle, part):
        row = self.index.rows[handle].item()
        offset, size = row[2 * _PARTS.index(part) : 2 * _PARTS.index(part) + 2]
        if not size:
            return b""
        path, _ = self.index.file_of(handle)
        data = files.read(path, offset, size)
        if len(data) < size:
            raise RecordError("truncated", f"the tar ends inside the {part}")
        return data


def scan(path: str) -> index.Scan:
    """Finds the records of a tar by its headers."""
    rows, problems, digest = [], [], hashlib.sha256()
    key, row, seen = None, None, set()
    for name, offset, size, kind in members(path, problems):
        digest.update(f"{name}\0{size}\0".encode())
        if kind not in "0\0 7":
            if kind in "12":
                problems.append(("link", f"{name} is a link, which is not followed"))
            continue
        folder, _, last = name.rpartition("/")
        stem, dot, ending = last.partition(".")
        ending = ending.lower()
        if not dot or not stem:
            continue
        if ".." in name.split("/") or name.startswith("/"):
            problems.append(("unsafe_name", f"{name} points outside the archive"))
            continue
        if (here := f"{folder}/{stem}") != key:
            if here in seen:
                problems.append(("duplicate_name", f"{name} comes twice"))
            key, row = here, [0] * 6
            seen.add(key)
            rows.append(row)
        last_ending = ending.rpartition(".")[2]
        if last_ending in IMAGES:
            part = 0
        elif ending in TEXTS:
            part = 2
        elif ending == "json":
            part = 4
        else:
            continue
        if row[part]:
            problems.append(("duplicate_name", f"{name}: the record has another such member"))
            continue
        row[part : part + 2] = offset, size
    # What holds neither image nor text is no record: an index file beside the data, a README.
    kept = [tuple(row) for row in rows if row[0] or row[2] or row[4]]
    return index.Scan(np.array(kept, ROW), digest.hexdigest(), tuple(problems))


def members(path: str, problems: list) -> Iterator[tuple[str, int, int, str]]:
    """(name, offset of the data, size, type) of each member of a tar.

    Damage is appended to `problems`: what follows a damaged header cannot be found.
    """
    length = files.size(path)
    window = _Window(path, _REMOTE_BLOCK if files.is_remote(path) else _BLOCK)
    position, long_name, attributes = 0, None, {}
    while position + _BLOCK <= length:
        header = window.read(position, _BLOCK)
        if not any(header):
            return
        checksum = sum(header[:148]) + 8 * 32 + sum(header[156:])
        try:
            size, expected = _number(header[124:136]), _number(header[148:156])
        except ValueError:
            size, expected = 0, -1
        if checksum != expected:
            problems.append(("corrupt_record", f"no member header at byte {position}"))
            return
        kind = chr(header[156])
        data = position + _BLOCK
        if kind in "xLg":
            content = window.read(data, size)
            if kind == "L":
                long_name = _string(content)
            elif kind == "x":
                attributes = _attributes(content)
        else:
            name = attributes.get("path") or long_name
            if name is None:
                name = _string(header[:100])
                if header[257:263] == b"ustar\0" and header[345]:
                    name = f"{_string(header[345:500])}/{name}"
            size = int(attributes.get("size", size))
            yield name, data, size, kind
            long_name, attributes = None, {}
        position = data + -(-size // _BLOCK) * _BLOCK
        if data + size > length:
            return  # reading the record tells that it is truncated
    if position < length:
        problems.append(("truncated", f"the tar ends inside a header at byte {position}"))


class _Window:
    """Reads through a file in steps, asking for more than a step where a request is dear."""

    def __init__(self, path: str, block: int):
        self._path, self._block, self._start, self._data = path, block, 0, b""

    def read(self, offset: int, count: int) -> bytes:
        skip = offset - self._start
        if skip < 0 or skip + count > len(self._data):
            self._start, skip = offset, 0
            self._data = files.read(self._path, offset, max(count, self._block))
        return self._data[skip : skip + count]


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes that octal digits cannot hold
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _string(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _attributes(content: bytes) -> dict[str, str]:
    """The "length key=value" lines of an extended header."""
    found = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or int(digits) > len(content) or int(digits) <= len(digits):
            break
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[int(digits) :]
    return found


def _member_name(path: str, data_offset: int) -> str:
    try:
        return os.path.basename(_string(files.read(path, data_offset - _BLOCK, 100)))
    except OSError:
        return ""
