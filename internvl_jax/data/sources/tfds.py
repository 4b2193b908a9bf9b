"""Data sets prepared by tensorflow-datasets, read without TensorFlow."""

from collections.abc import Mapping, Sequence

import numpy as np

from internvl_jax.data.sources.base import Source, stable_number


class TfdsImages(Source):
    """A data set prepared by tensorflow-datasets in the array_record format.

    captions: {language: name of a text feature}. The image feature is named "image".
    tensorflow-datasets is imported here, so that nothing else needs it; TensorFlow is not used.
    """

    def __init__(self, name: str, split: str, captions: Mapping[str, str], *, data_dir=None):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(
                "reading this source needs tensorflow-datasets: pip install 'internvl-jax[data]'"
            ) from error
        # Images stay encoded until they are asked for.
        self._data = tfds.data_source(
            name, split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()}
        )
        self._captions = dict(captions)
        self.identity = f"tfds {self._data.dataset_info.full_name} {split} {len(self._data)}"

    def __len__(self) -> int:
        return len(self._data)

    def fetch(self, indices: Sequence[int]) -> list:
        records = self._data.__getitems__(list(indices)) if len(indices) else []
        return list(zip(indices, records, strict=True))

    def image_in(self, handle: tuple) -> bytes:
        return handle[1]["image"]

    def texts_in(self, handle: tuple) -> dict:
        index, record = handle
        captions = {
            language: tuple(np.atleast_1d(np.asarray(record[key], object)))
            for language, key in self._captions.items()
        }
        captions = {key: tuple(c.decode() for c in values) for key, values in captions.items()}
        number = record.get("image_id", index)
        if isinstance(number, bytes | str):  # a file name, as coco_captions has it
            number = stable_number(str(number))
        return {"image_id": int(number), "captions": captions}
