"""P: the older layout, with and without the buffers that such checkpoints carry."""

import jax
import pytest

from internvl_jax.models import bind
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("P"))
def test_older_layout(case, tmp_path):
    buffers = [f for f in case.info["files"] if f not in ("weights.safetensors", "io.safetensors")]
    for file in buffers:
        tmp_path.joinpath(file).symlink_to((case.path / file).resolve())
    config, params = case.load(tmp_path)
    compare = cases.Comparison(case)

    @jax.jit
    def run(params, pixels, ids):
        model = bind(config, params)
        vision = model.vision(pixels)
        image, text = model.image_features(vision, "c"), model.encode_text(ids)
        return vision, image, text, model.similarity(image, text)

    encode = jax.jit(lambda params, ids: bind(config, params).encode_text(ids))
    ids = case.inputs("text")
    vision, image, text, logits = run(params, case.pixels("image"), ids)
    compare.close("features", vision)
    compare.close("image_embeds", image)
    compare.close("text_embeds", text)
    compare.close("logits_per_image", logits)
    compare.close("logits_per_text", logits.T)
    for name in compare.names("text_embeds_"):
        kind = name.removeprefix("text_embeds_")
        compare.close(name, encode(params, case.inputs(f"text_{kind}")))
    compare.done()
