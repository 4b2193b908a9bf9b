"""V: the vision tower against the official one, layer by layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax.models import bind
from internvl_jax.models.positions import resize_grid, resize_position_embedding
from internvl_jax.models.vit import patchify
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("V"))
def test_vision_tower(case, tmp_path):
    config, params = case.load(tmp_path)
    compare = cases.Comparison(case)
    if "patch_kernel" in compare:
        backbone(case, config, params, compare)
    elif "position_embedding" in compare:
        resized_once(case, config, params, compare)
    else:
        for name in case.tensors:
            if name.startswith("in.pixel_values"):
                suffix = name.removeprefix("in.pixel_values")
                tower(config, params, case.pixels(f"pixel_values{suffix}"), compare, suffix)
    compare.done()


def tower(config, params, pixels, compare, suffix=""):
    """Patch projection, positions and every hidden state of one image batch."""
    patch = config.vit.patch_size
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)

    @jax.jit
    def run(params, pixels):
        vit = bind(config, params).vit
        last, states = vit(pixels, hidden_states=True)
        positions = resize_position_embedding(vit.position_embedding[...], grid)
        return vit.patch_embed(patchify(pixels, patch)), positions, last, states

    patches, positions, last, states = run(params, pixels)
    if f"patch_conv{suffix}" in compare:
        as_grid = patches.reshape(patches.shape[0], *grid, -1).transpose(0, 3, 1, 2)
        compare.close(f"patch_conv{suffix}", as_grid)
    if f"patch_pos_embed{suffix}" in compare:
        compare.close(f"patch_pos_embed{suffix}", positions[None, 1:])
    for layer, state in enumerate(states):
        compare.close(f"hidden_{layer}{suffix}", state)
    compare.close(f"last_hidden_state{suffix}", last)
    if f"pooler_output{suffix}" in compare:
        compare.close(f"pooler_output{suffix}", last[:, 0])


def resized(config, params, pixels):
    """The tower with its position embedding resized once to the images' grid."""
    side = pixels.shape[1]
    grid = (side // config.vit.patch_size, pixels.shape[2] // config.vit.patch_size)
    table = resize_position_embedding(jnp.asarray(params["vit"]["position_embedding"]), grid)
    vit = params["vit"] | {"position_embedding": table}
    return replace(config, vit=replace(config.vit, image_size=side)), params | {"vit": vit}


def resized_once(case, config, params, compare):
    pixels = case.pixels("pixel_values")
    config, params = resized(config, params, pixels)
    compare.close("position_embedding", params["vit"]["position_embedding"][None])
    tower(config, params, pixels, compare)


def backbone(case, config, params, compare):
    """The classification backbone: kernel and positions resized on loading, then its head."""
    patch = case.config["patch_size"]
    old = config.vit.patch_size
    kernel = jnp.asarray(params["vit"]["patch_embed"]["kernel"])
    kernel = resize_grid(kernel.reshape(old, old, 3, -1), patch, patch)
    compare.close("patch_kernel", kernel.transpose(3, 2, 0, 1))
    embed = params["vit"]["patch_embed"] | {"kernel": kernel.reshape(patch * patch * 3, -1)}
    params = {"vit": params["vit"] | {"patch_embed": embed}}
    side = config.vit.grid * patch
    config = replace(config, vit=replace(config.vit, patch_size=patch, image_size=side))

    pixels = case.pixels("pixel_values")
    config, params = resized(config, params, pixels)
    compare.close("pos_embed", params["vit"]["position_embedding"][None])
    tokens = jax.jit(lambda p, x: bind(config, p).vision(x))(params, pixels)
    compare.close("features", tokens)
    compare.close("logits", classify(np.asarray(tokens), case.weights()))


def classify(tokens, head):
    """Class token beside the mean patch, batch normalisation (eps 1e-6), linear layer."""
    both = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(axis=1)], axis=1)
    normal = (both - head["norm.running_mean"]) / np.sqrt(head["norm.running_var"] + 1e-6)
    return (normal * head["norm.weight"] + head["norm.bias"]) @ head["head.weight"].T + head[
        "head.bias"
    ]
