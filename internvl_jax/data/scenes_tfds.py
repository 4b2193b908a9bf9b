"""The rendered scenes as a tensorflow-datasets builder that works without TensorFlow.

    builder = InternvlScenes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    source = sources.TfdsImages(
        "internvl_scenes", "test", {"en": "caption_en"}, data_dir=folder
    )

Images are handed over as PNG files: given as arrays, tensorflow-datasets would need TensorFlow
to encode them. The same holds for every file format but array_record.
"""

import io
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from internvl_jax.data import scenes, sources, text


class InternvlScenes(tfds.core.GeneratorBasedBuilder):
    """One feature per language and caption kind, beside image, colour, shape and relation."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First version."}

    def __init__(self, *, image_size: int = 48, counts: dict[str, int] | None = None, **kwargs):
        """counts: records per split; all splits in full size by default."""
        self._image_size = image_size
        self._counts = counts or sources.SCENE_COUNTS
        super().__init__(**kwargs)

    def _info(self):
        size = self._image_size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "image_id": tfds.features.Scalar(np.int32),
            "color": tfds.features.ClassLabel(names=list(scenes.COLORS)),
            "shape": tfds.features.ClassLabel(names=list(scenes.SHAPES)),
            "relation": tfds.features.Text(),
        }
        features |= {f"caption_{language}": tfds.features.Text() for language in text.LANGUAGES}
        return self.dataset_info_from_configs(
            description="Scenes of one or two coloured shapes with captions in four languages.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self._counts}

    def _generate_examples(self, split):
        source = sources.EmbeddedScenes(split, self._counts[split], self._image_size)
        for index, scene in enumerate(source.scenes):
            example = source[index]
            file = io.BytesIO()
            Image.fromarray(example["image"]).save(file, "PNG")
            file.seek(0)
            captions = example["captions"]
            yield (
                index,
                {
                    "image": file,
                    "image_id": example["image_id"],
                    "color": example["color"],
                    "shape": example["shape"],
                    "relation": scene.relation or "",
                    **{f"caption_{x}": captions[x][0] for x in text.LANGUAGES},
                },
            )
