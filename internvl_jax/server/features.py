"""Features of texts or of images for the embeddings route, by few programs."""

from collections.abc import Iterator, Sequence

import numpy as np

from internvl_jax.loading import Model


class Features:
    """Called with rows, gives their features float32 [N, E].

    mode: "c" or "g" of images uint8 [H, H, 3]; None for texts, whose rows are ids without padding.
    Rows go through the model alone or `batch` at a time, so that there are two programs for images
    and two for each length of texts, in steps of 16.
    """

    def __init__(self, model: Model, mode: str | None, batch: int):
        self._model, self._mode, self._batch = model, mode, batch

    def __call__(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), self._batch):
            some = rows[start : start + self._batch]
            size = 1 if len(some) == 1 else self._batch
            filled = [*some, *[some[-1]] * (size - len(some))]
            parts.append(self._encode(filled)[: len(some)])
        return np.concatenate(parts)

    def warm(self) -> Iterator[str]:
        """Run every program once; yields what it was."""
        for size in sorted({1, self._batch}):
            if self._mode is not None:
                side = self._model.config.vit.image_size
                self._encode([np.zeros((side, side, 3), np.uint8)] * size)
                yield f"embeddings of {size} image(s), mode {self._mode}"
                continue
            for length in range(16, self._model.text_length + 16, 16):
                self._encode([np.ones(min(length, self._model.text_length), np.int32)] * size)
                yield f"embeddings of {size} text(s) of up to {length} tokens"

    def _encode(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        if self._mode is not None:
            return self._model.encode_image(np.stack(rows), self._mode)
        longest = max(map(len, rows))
        ids = np.zeros((len(rows), -(-longest // 16) * 16), np.int32)
        for row, own in zip(ids, rows, strict=True):
            row[: len(own)] = own
        return self._model.encode_text(ids)
