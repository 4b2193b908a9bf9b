"""The tensorflow-datasets builder prepares and reads records without TensorFlow."""

import subprocess
import sys

import numpy as np

from internvl_jax.data import sources

PREPARE = """
import sys
from internvl_jax.data.scenes_tfds import InternvlScenes
builder = InternvlScenes(
    data_dir=sys.argv[1], file_format="array_record", counts={"train": 8, "test": 5}
)
builder.download_and_prepare()
assert "tensorflow" not in sys.modules
"""


def test_prepared_records_are_the_scenes(tmp_path):
    # In its own process: only there can it be seen that TensorFlow is not imported.
    subprocess.run([sys.executable, "-c", PREPARE, str(tmp_path)], check=True, timeout=120)
    captions = {"en": "caption_en", "ko": "caption_ko"}
    read = sources.TfdsImages("internvl_scenes", "test", captions, data_dir=tmp_path)
    original = sources.EmbeddedScenes("test", 5)
    assert len(read) == 5 and "internvl_scenes/1.0.0 test 5" in read.identity
    by_content = {read.image(i).tobytes(): read[i] for i in range(5)}
    for i in range(5):
        example = by_content[original.image(i).tobytes()]
        assert example["image"].dtype == np.uint8
        assert example["image_id"] == original.texts(i)["image_id"]
        for language in captions:
            caption = original.texts(i)["captions"][language][0]
            assert example["captions"][language] == (caption,)
