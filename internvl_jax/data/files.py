"""Files by path or address (gs://, s3://, memory:// …): the one layer that every source reads by.

Local files are read with `pread`, which any number of threads may do at once; addresses go through
fsspec (extra [data]), which needs gcsfs for gs:// (extra [gcs]).
"""

import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re

_OPEN_FILES = 256
_BRACES = re.compile(r"\{([^{}]*)\}")


def is_remote(path: str) -> bool:
    return "://" in path


def expand(pattern: str | os.PathLike) -> list[str]:
    """Paths of `a-{00000..01242}.tar`, `{a,b}.tar`, `*.tar` and lists joined by `::`, in order.

    A range keeps the width of its first number. What a `*` matches is sorted by name. Raises
    ValueError if nothing matches.
    """
    found = []
    for part in os.fspath(pattern).split("::"):
        for path in _braces(part):
            found += _glob(path) if re.search(r"[*?\[]", path) else [path]
    if not found:
        raise ValueError(f"no files match {os.fspath(pattern)}")
    return found


def _braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    if dots and first.isdigit() and last.isdigit():
        words = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        words = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + word + rest for word, rest in itertools.product(words, _braces(tail))]


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return sorted(glob.glob(pattern))
    fs, inner = _filesystem(pattern)
    return sorted(fs.unstrip_protocol(path) for path in fs.glob(inner))


def exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    fs, inner = _filesystem(path)
    return fs.isfile(inner)


def size(path: str) -> int:
    """Bytes of a file; FileNotFoundError if there is none."""
    if not is_remote(path):
        return os.stat(path).st_size
    fs, inner = _filesystem(path)
    return fs.info(inner)["size"]


def stamp(path: str) -> str:
    """Size and time of the last change: tells whether what was derived from a file still holds."""
    if not is_remote(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    fs, inner = _filesystem(path)
    info = fs.info(inner)
    changed = next((info[k] for k in ("etag", "ETag", "mtime", "created") if info.get(k)), "")
    return f"{info['size']} {changed}"


def read(path: str, offset: int = 0, count: int | None = None) -> bytes:
    """`count` bytes from `offset` on, or all to the end; fewer where the file ends earlier."""
    if not is_remote(path):
        handle = _opened(path)
        if count is None:
            count = os.fstat(handle.number).st_size - offset
        data = os.pread(handle.number, count, offset)
        while len(data) < count:  # the system gives at most 2 GiB at a time
            more = os.pread(handle.number, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data
    if count == 0:
        return b""
    fs, inner = _filesystem(path)
    return fs.cat_file(inner, start=offset, end=None if count is None else offset + count)


def folder_of(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def inside(root: str, name: str) -> str | None:
    """The path of `name` under `root`, or None if it would lie outside (`..`, links, absolute)."""
    if is_remote(root):
        parts = pathlib.PurePosixPath(name).parts
        return None if ".." in parts or name.startswith("/") else f"{root.rstrip('/')}/{name}"
    path = os.path.realpath(os.path.join(root, name))
    root = os.path.realpath(root)
    return path if os.path.commonpath([path, root]) == root else None


def beside(path: str, ending: str) -> str:
    """Where to keep what is derived from a file: beside it, or in the cache folder.

    The cache folder is $XDG_CACHE_HOME/internvl_jax/index; it is used where the file's own folder
    cannot be written. An existing file is found in either place.
    """
    near = path + ending
    if not is_remote(path):
        writable = os.access(os.path.dirname(near) or ".", os.W_OK)
        if writable or os.path.isfile(near):
            return near
    name = hashlib.sha256(path.encode()).hexdigest()[:24]
    return str(cache_folder() / f"{name}{ending}")


def cache_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base) / "internvl_jax" / "index"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _filesystem(path: str):
    try:
        import fsspec

        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise ImportError(
            f"reading {path}: {error}; pip install 'internvl-jax[data,gcs]'"
        ) from error


class _Descriptor:
    """An open file, closed when its last reader lets go of it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)


@functools.lru_cache(_OPEN_FILES)
def _opened(path: str) -> _Descriptor:
    return _Descriptor(path)


def forget() -> None:
    """Closes the files that are kept open, so that replaced ones are opened anew."""
    _opened.cache_clear()
