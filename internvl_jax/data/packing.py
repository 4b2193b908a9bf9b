"""Several conversations in one row, which a row of a fixed length would else waste on padding.

The stream is cut into windows: a window is as many conversations as a few neighbouring rows of a
batch are to hold. Which row of its window a conversation lies in follows from the window alone, so
a packed batch is still a function of (data, seed, step) and there is no state to save. The price:
the conversations at a window's end that find no room are left out for this epoch, instead of being
carried over to the next window.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from internvl_jax.data import conversation, stream
from internvl_jax.data.errors import RecordError
from internvl_jax.data.tasks import Draft, squares_of

WINDOW = 16  # rows at most; more fill the rows little better and are more work for each process


def window_rows(batch_size: int) -> int:
    """Rows of a window: the largest divisor of the batch up to WINDOW."""
    return max(n for n in range(1, WINDOW + 1) if batch_size % n == 0)


def row_squares(max_tiles: int, conversations: int, squares: int = 0) -> int:
    """Room for squares in a row; by default what all its conversations may need together."""
    return squares or squares_of(max_tiles) * max(1, conversations)


def pack(sizes: Sequence[tuple[int, ...]], room: tuple[int, ...], rows: int) -> list[list[int]]:
    """Which of the things go into each row: the longest run from the first on that fits.

    sizes: of each, in every unit (tokens, squares); room: of a row. The largest is placed first,
    where it leaves the least room (best fit decreasing). A single one must fit into a row.
    """
    sums = np.cumsum(np.asarray(sizes, np.int64), axis=0)
    count = int(np.all(sums <= rows * np.asarray(room), axis=1).sum())
    while (placed := _placed(sizes[:count], room, rows)) is None:
        count -= 1
    return placed


def _placed(sizes, room, rows):
    left = [list(room) for _ in range(rows)]
    placed: list[list[int]] = [[] for _ in range(rows)]
    for item in sorted(range(len(sizes)), key=lambda n: (*(-x for x in sizes[n]), n)):
        fits = [
            row for row in range(rows)
            if all(x <= y for x, y in zip(sizes[item], left[row], strict=True))
        ]
        if not fits:
            return None
        best = min(fits, key=lambda row: left[row])
        placed[best].append(item)
        left[best] = [y - x for x, y in zip(sizes[item], left[best], strict=True)]
    return [sorted(row) for row in placed]


class PackedBatches(stream.Batches):
    """Batches whose rows hold several conversations.

    A row has "tokens" and "labels" [length], one conversation after another; "segments" [length],
    the number of each token's conversation from 1 on and 0 for padding; "image" [squares, …], those
    of all its conversations in order. The id of a row is those of its conversations, joined by +.

    room: tokens and squares of a row. draft: (source number, handle, generator) → `tasks.Draft`.
    conversations: per row, on average.

    A conversation that turns out bad while the rows are planned is replaced, as elsewhere; one
    whose image cannot be decoded after that leaves its room empty.
    """

    def __init__(
        self,
        places: grain.MapDataset,
        sources: Sequence[Any],
        draft: Callable[[int, Any, np.random.Generator], Draft],
        batch_size: int,
        rows: Sequence[int],
        seed: int,
        *,
        conversations: int,
        length: int,
        squares: int,
        image_size: int,
    ):
        super().__init__(places, sources, draft, batch_size, rows, seed)
        self.conversations, self.room = conversations, (length, squares)
        self._image_size = image_size
        self._window = window_rows(batch_size)

    def __len__(self) -> int:
        return super().__len__() // self.conversations

    def ids(self, step: int) -> list[str]:
        """The conversations of each row. Their texts are read, since their lengths decide."""
        return ["+".join(name for name, _ in row) for row, _ in self.planned(step)]

    def __getitem__(self, step):
        if isinstance(step, slice):
            return self.slice(step)
        skipped: list[stream.Skipped] = []
        rows, ids = [], []
        for row, found in self.planned(step):
            skipped += [one for one in found if one not in skipped]
            array, names = self._row(row, skipped)
            rows.append(array)
            ids.append("+".join(names))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return batch, tuple((s.place, s.cause, s.message) for s in skipped), ids

    def planned(self, step: int) -> Iterator[tuple[list[tuple[str, Draft]], list[stream.Skipped]]]:
        """([(id, conversation) …], records skipped in the window) of each of this process's rows.

        No window reaches beyond its batch, since its rows divide those of the batch.
        """
        windows = {}
        for row in self._rows:
            number, place = divmod(step * self._batch_size + row, self._window)
            if number not in windows:
                windows[number] = self._plan(number)
            planned, skipped = windows[number]
            yield planned[place], skipped

    def _plan(self, number):
        count = self._window * self.conversations
        skipped: list[stream.Skipped] = []
        drafts, ids = self._examples(range(number * count, (number + 1) * count), skipped)
        sizes = [(len(draft.ids), draft.squares) for draft in drafts]
        rows = pack(sizes, self.room, self._window)
        return [[(ids[n], drafts[n]) for n in row] for row in rows], skipped

    def _row(self, planned, skipped):
        length, squares = self.room
        side = self._image_size
        row = {
            "image": np.zeros((squares, side, side, 3), np.uint8),
            "tokens": np.zeros(length, np.int32),
            "labels": np.full(length, conversation.IGNORE, np.int32),
            "segments": np.zeros(length, np.int32),
        }
        at, square, names = 0, 0, []
        for name, draft in planned:
            try:
                shown = draft.show()
            except RecordError as error:
                source, index = (int(n) for n in name.split(":"))
                place = self._sources[source].place(index)
                skipped.append(stream.Skipped(place, error.cause, error.message))
                continue
            names.append(name)
            end = at + len(draft.ids)
            row["tokens"][at:end], row["labels"][at:end] = draft.ids, draft.labels
            row["segments"][at:end] = len(names)
            for pixels in shown:
                row["image"][square : square + len(pixels)] = pixels
                square += len(pixels)
            at = end
        return row, names
