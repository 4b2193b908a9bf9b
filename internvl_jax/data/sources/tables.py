"""Lists of images in JSON Lines, JSON or CSV, with the images in a folder.

A record is an object with "image", a path relative to the root (the list's own folder by default);
"caption", a text or {language: text or list of texts}; and/or "conversations" in LLaVA form, a
list of {"from": "human" | "gpt", "value": text}. In a conversation "image" may be a list, or be
absent for text alone.
"""

import codecs
import contextlib
import csv
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from internvl_jax.data import files
from internvl_jax.data.errors import RecordError
from internvl_jax.data.sources import base, index

VERSION = "lines 1"
ROW = np.dtype([("at", "<u8"), ("size", "<u4"), ("line", "<u4")])
PATH_KEYS = ("image", "filepath", "file_name", "image_name", "image_path", "file", "path", "url")
_SPACE = re.compile(r"\s*")
_MOST = 64 * 2**20  # characters of one record
CSV_CAPTIONS = ("caption", "captions", "text", "title", "comment", "raw")


class _Listed(base.Source):
    """Records that name image files under a root."""

    def __init__(self, path: str | os.PathLike, root, language: str):
        self.path = os.fspath(path)
        self.root = os.fspath(root) if root else files.folder_of(self.path)
        self.language = language

    def record(self, handle: int) -> Mapping[str, Any]:
        raise NotImplementedError

    def image_in(self, handle: int) -> bytes | tuple[bytes, ...] | None:
        name = self.record(handle).get("image")
        if isinstance(name, list):
            return tuple(self._file(n) for n in name)
        return None if name is None else self._file(name)

    def _file(self, name):
        path = files.inside(self.root, name)
        if path is None:
            raise RecordError("outside_root", f"image {name!r} lies outside {self.root}")
        try:
            return files.read(path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RecordError("missing_image", f"{reason}: {path!r}") from error

    def texts_in(self, handle: int) -> dict:
        record = self.record(handle)
        name = record.get("image")
        name = name if isinstance(name, str) else json.dumps(name)
        return base.texts_of(record, name, self.language)

    def _checked(self, record: Any) -> Mapping[str, Any]:
        name = record.get("image") if isinstance(record, dict) else 0
        several = isinstance(name, list) and name and all(isinstance(n, str) for n in name)
        chat = isinstance(record, dict) and "conversations" in record
        if not (isinstance(name, str) or (chat and (several or name is None))):
            raise RecordError("invalid_json", 'each line must be an object with an "image" path')
        if "caption" not in record and "conversations" not in record:
            raise RecordError("missing_text", 'neither "caption" nor "conversations" is given')
        return record


class JsonlImages(_Listed):
    """A JSON Lines file of records, one object a line.

    Lines are found by their byte offsets and parsed when read, so the file may be large. A line
    that cannot be used is a RecordError whose place is FILE:LINE.
    """

    def __init__(self, path: str | os.PathLike, root=None, language: str = "en"):
        super().__init__(path, root, language)
        self.index = index.opened([self.path], scan_lines, VERSION)

    @property
    def identity(self) -> str:
        name = self.path.rpartition("/")[2]
        return f"jsonl {name} {len(self)} {self.index.digest}"

    def __len__(self) -> int:
        return len(self.index)

    def place(self, index: int) -> str:
        return f"{self.path}:{self.index.rows[index]['line']}"

    def record(self, handle: int) -> Mapping[str, Any]:
        row = self.index.rows[handle]
        line = files.read(self.path, int(row["at"]), int(row["size"]))
        return self._checked(base.parsed_json(line, of=object))


class CsvImages(_Listed):
    """A CSV file with a header; the separator is found in it (comma, tab, bar, semicolon).

    Of its columns one names the image (PATH_KEYS) and one holds a caption (CSV_CAPTIONS).
    """

    def __init__(self, path: str | os.PathLike, root=None, language: str = "en"):
        super().__init__(path, root, language)
        self.index = index.opened([self.path], scan_quoted, "csv 1")
        if len(self.index) == 0:
            raise ValueError(f"{self.path}: the first line must be a header that names the columns")
        header = self._text(0).lstrip("\ufeff")
        self._separator = max(",\t|;", key=header.count)
        columns = [name.strip() for name in next(self._cells(header))]
        self._image = self._column(columns, PATH_KEYS, "image")
        self._caption = self._column(columns, CSV_CAPTIONS, "caption")

    def _cells(self, text):
        return csv.reader([text], delimiter=self._separator, skipinitialspace=True)

    def _column(self, columns, names, what):
        for name in names:
            if name in columns:
                return columns.index(name)
        raise ValueError(
            f"{self.path}: no column for the {what} among {', '.join(columns)}; name it "
            f"{' or '.join(names[:2])}"
        )

    @property
    def identity(self) -> str:
        return f"csv {self.path.rpartition('/')[2]} {len(self)} {self.index.digest}"

    def __len__(self) -> int:
        return len(self.index) - 1

    def place(self, index: int) -> str:
        return f"{self.path}:{self.index.rows[index + 1]['line']}"

    def record(self, handle: int) -> Mapping[str, Any]:
        try:
            rows = list(self._cells(self._text(handle + 1)))
        except csv.Error as error:
            raise RecordError("corrupt_record", f"not valid CSV: {error}") from error
        cells = [cell.strip() for cell in rows[0]] if rows else []
        if len(cells) <= max(self._image, self._caption):
            raise RecordError("corrupt_record", f"has {len(cells)} columns, too few")
        return {"image": cells[self._image], "caption": cells[self._caption]}

    def _text(self, number):
        row = self.index.rows[number]
        try:
            return files.read(self.path, int(row["at"]), int(row["size"])).decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RecordError("invalid_text", f"not UTF-8: {error}") from error


class JsonImages(_Listed):
    """A JSON file: a list of records, or COCO's or Karpathy's layouts.

    Known are a list of records (the official coco_karpathy_train.json); {"images": [{"filename",
    "filepath", "sentences": [{"raw"}], "split"}]}; {"images": [{"id", "file_name"}],
    "annotations": [{"image_id", "caption"}]} (COCO, NoCaps). split: of Karpathy's.

    The records are written once as lines into the cache folder and read from there as
    `JsonlImages` reads them. A list may so be larger than memory; of the other layouts the whole is
    parsed, once.
    """

    def __init__(self, path: str | os.PathLike, root=None, language: str = "en", split: str = ""):
        super().__init__(path, root, language)
        if not files.exists(self.path):
            raise ValueError(f"no data file at {self.path}")
        self.split = split
        self._lines, self._digest = _as_lines(self.path, split)
        self.index = index.opened([self._lines], scan_lines, VERSION)

    @property
    def identity(self) -> str:
        name = self.path.rpartition("/")[2]
        return f"json {name} {self.split} {len(self)} {self._digest}"

    def __len__(self) -> int:
        return len(self.index)

    def place(self, index: int) -> str:
        return f"{self.path}: record {index}"

    def record(self, handle: int) -> Mapping[str, Any]:
        row = self.index.rows[handle]
        line = files.read(self._lines, int(row["at"]), int(row["size"]))
        return self._checked(base.parsed_json(line, of=object))


def _as_lines(path: str, split: str) -> tuple[str, str]:
    """(the file of a JSON file's records, one a line; digest of the JSON file)."""
    name = hashlib.sha256(f"{path} {split}".encode()).hexdigest()[:24]
    target = files.cache_folder() / f"{name}.jsonl"
    note, stamp = target.with_suffix(".from"), files.stamp(path)
    with contextlib.suppress(OSError, ValueError):
        made_of, digest = note.read_text("utf-8").split("\n")
        if made_of == stamp and target.exists():
            return str(target), digest
    blocks = _Blocks(path)
    try:
        with index.whole_file(str(target)) as file:
            for record in _unfolded(blocks, split):
                file.write(json.dumps(record).encode() + b"\n")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a list of images: {error!r}") from error
    digest = blocks.digest.hexdigest()
    with index.whole_file(str(note)) as file:
        file.write(f"{stamp}\n{digest}".encode())
    return str(target), digest


class _Blocks:
    """The text of a file, a block at a time. digest: of what was read."""

    def __init__(self, path: str, block: int = 2**20):
        self._path, self._block, self._offset = path, block, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.digest = hashlib.sha256()

    def next(self) -> str:
        """The next part, "" at the end."""
        text = ""
        while not text:
            data = files.read(self._path, self._offset, self._block)
            self._offset += len(data)
            self.digest.update(data)
            text = self._decoder.decode(data, final=not data)
            if not data:
                break
        return text


def _unfolded(blocks: _Blocks, split: str) -> Iterator[Any]:
    start = blocks.next().lstrip("\ufeff \t\r\n")
    if start.startswith("["):
        yield from _elements(start[1:], blocks)
        return
    parts = [start]
    while part := blocks.next():
        parts.append(part)
    content = json.loads("".join(parts))
    if "annotations" in content:
        captions: dict[Any, list[str]] = {}
        for note in content["annotations"]:
            captions.setdefault(note["image_id"], []).append(note["caption"])
        for entry in content["images"]:
            if entry["id"] in captions:
                yield {
                    "image": entry["file_name"],
                    "image_id": entry["id"],
                    "caption": captions[entry["id"]],
                }
        return
    for entry in content["images"]:
        # Karpathy's "restval" is part of his training split.
        if split and {"restval": "train"}.get(entry["split"], entry["split"]) != split:
            continue
        folder = entry.get("filepath")
        yield {
            "image": f"{folder}/{entry['filename']}" if folder else entry["filename"],
            "caption": [sentence["raw"] for sentence in entry["sentences"]],
        }


def _elements(text: str, blocks: _Blocks) -> Iterator[Any]:
    """The elements of a JSON list whose bracket is open; no more than one is held at a time."""
    decode = json.JSONDecoder().raw_decode
    at, first = 0, True
    while True:
        while not (rest := _SPACE.match(text, at).end()) < len(text):
            text, at = blocks.next(), 0
            if not text:
                raise ValueError("the list has no end")
        at = rest
        if text[at] == "]":
            if text[at + 1 :].strip() or blocks.next().strip():
                raise ValueError("something follows the list")
            return
        if not first:
            if text[at] != ",":
                raise ValueError(f"a comma is missing before {text[at : at + 20]!r}")
            at += 1
        while True:
            begin = _SPACE.match(text, at).end()
            with contextlib.suppress(json.JSONDecodeError):
                value, end = decode(text, begin)
                if end < len(text):  # a number might go on
                    break
            more = blocks.next()
            if not more or len(text) - at > _MOST:
                raise ValueError(f"not valid JSON at {text[begin : begin + 20]!r}")
            text, at = text[at:] + more, 0
        yield value
        at, first = end, False


def scan_lines(path: str) -> index.Scan:
    """Finds the lines of a text file that are not blank."""
    rows, digest = index.Rows(ROW), hashlib.sha256()
    for number, (position, line) in enumerate(_lines(path), start=1):
        digest.update(line)
        if line.strip():
            rows.append((position, len(line), number))
    return index.Scan(rows.array(), digest.hexdigest())


def scan_quoted(path: str) -> index.Scan:
    """Finds the rows of a CSV file: lines, joined where a quoted cell holds a line break."""
    rows, digest, quotes, start = index.Rows(ROW), hashlib.sha256(), 0, None
    for number, (position, line) in enumerate(_lines(path), start=1):
        digest.update(line)
        if start is None:
            start = (position, number)
        quotes += line.count(b'"')
        end = position + len(line)
        if quotes % 2 == 0:
            if line.strip():
                rows.append((start[0], end - start[0], start[1]))
            start = None
    if start is not None:
        rows.append((start[0], end - start[0], start[1]))
    return index.Scan(rows.array(), digest.hexdigest())


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(offset, line) pairs; a line break ends a line."""
    block = (16 if files.is_remote(path) else 1) * 2**20  # a request is dear
    offset, rest = 0, b""
    position = 0
    while data := files.read(path, offset, block):
        offset += len(data)
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield position, line + b"\n"
            position += len(line) + 1
    if rest:
        yield position, rest


@functools.cache
def names_of(path: str) -> tuple[str, ...]:
    """The lines of a file of names."""
    return tuple(line.strip() for line in files.read(path).decode().splitlines() if line.strip())
