"""Search of many queries in a gallery of features that lies in files and is never all in memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

TOP = 10
_ROUNDING = 1e-6  # relative, of a float32 inner product


class Gallery:
    """Rows of features in one or more .npy files, mapped into memory: [M, E] in all.

    The pages of a mapped file belong to the system's cache, not to the process; what a search
    allocates is bounded by its blocks.

    Raises ValueError: no file, or files of different widths.
    """

    def __init__(self, files: Sequence[str | Path]):
        if not files:
            raise ValueError("a gallery needs at least one .npy file")
        self.parts = [np.load(file, mmap_mode="r") for file in files]
        widths = {part.shape[1] for part in self.parts if part.ndim == 2}
        if len(widths) != 1 or any(part.ndim != 2 for part in self.parts):
            pairs = zip(files, self.parts, strict=True)
            shapes = ", ".join(f"{file}: {list(part.shape)}" for file, part in pairs)
            raise ValueError(f"the files of a gallery must have one width; {shapes}")
        self.width = widths.pop()
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, rows: int):
        """(first row, float32 [≤ rows, E]) of everything, in order."""
        for start, part in zip(self.starts, self.parts, strict=False):
            for offset in range(0, len(part), rows):
                yield int(start) + offset, np.asarray(part[offset : offset + rows], np.float32)


def search(
    queries: np.ndarray,
    gallery: Gallery,
    right: np.ndarray | None = None,
    top: int = TOP,
    rows: int = 16384,
    query_block: int = 2048,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The best gallery rows of every query by inner product, and where the right one stands.

    Args:
        queries: float32 [N, E].
        right: [N] gallery row that is right for each query, or None.
        rows, query_block: sizes of a block of scores, which bound what is allocated:
            about 3 · rows · query_block · 4 bytes.

    Returns:
        hits [N, top] rows, best first (of equal scores the earlier row first); their scores; and
        rank [N]: how many other rows score at least as high as the right one, or None.

    A row whose score agrees with the right one's to within rounding counts against the model.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    count, top = len(queries), min(top, len(gallery))
    hits = np.zeros((count, top), np.int64)
    best = np.full((count, top), -np.inf, np.float32)
    own = None if right is None else _own_scores(queries, gallery, right)
    rank = None if right is None else np.zeros(count, np.int64)
    for start, block in gallery.blocks(rows):
        for first in range(0, count, query_block):
            chunk = slice(first, first + query_block)
            scores = queries[chunk] @ block.T  # [q, m]
            if rank is not None:
                # The other product may round differently: leave that much room.
                bound = own[chunk] - _ROUNDING * np.abs(own[chunk])
                rank[chunk] += np.count_nonzero(~(scores < bound[:, None]), axis=1)
                here = (right[chunk] >= start) & (right[chunk] < start + len(block))
                at = np.flatnonzero(here)
                mine = scores[at, right[chunk][at] - start]
                rank[first + at] -= ~(mine < bound[at])
            _merge(hits[chunk], best[chunk], scores, start)
    return hits, best, rank


def _own_scores(queries: np.ndarray, gallery: Gallery, right: np.ndarray) -> np.ndarray:
    """Score of every query with its right row."""
    if len(right) != len(queries) or right.min() < 0 or right.max() >= len(gallery):
        raise ValueError(f"right must give a row below {len(gallery)} for {len(queries)} queries")
    own = np.empty(len(queries), np.float32)
    for start, stop, part in zip(gallery.starts, gallery.starts[1:], gallery.parts, strict=False):
        at = np.flatnonzero((right >= start) & (right < stop))
        for some in np.array_split(at, max(len(at) // 4096, 1)):
            rows = np.asarray(part[right[some] - start], np.float32)
            own[some] = np.einsum("ne,ne->n", queries[some], rows)
    return own


def _merge(hits: np.ndarray, best: np.ndarray, scores: np.ndarray, start: int) -> None:
    """Put what a block of scores [q, m] has into the best so far, in place."""
    top = best.shape[1]
    # Most blocks improve few queries once the best are good: only these are sorted.
    rows = np.flatnonzero(scores.max(axis=1) > best[:, -1])
    if not len(rows):
        return
    part = scores[rows]
    if part.shape[1] > top:
        columns = np.argpartition(-part, top - 1, axis=1)[:, :top]
        columns.sort(axis=1)
    else:
        columns = np.broadcast_to(np.arange(part.shape[1]), part.shape)
    values = np.concatenate([best[rows], np.take_along_axis(part, columns, 1)], axis=1)
    names = np.concatenate([hits[rows], columns + start], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :top]
    best[rows] = np.take_along_axis(values, order, 1)
    hits[rows] = np.take_along_axis(names, order, 1)
