"""H and H2: chat models, as released and as `transformers` has them.

Features, logits, losses and generated ids.
"""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from internvl_jax import generate, losses
from internvl_jax.decoding import Decoding
from internvl_jax.models import bind
from internvl_jax.models.chat import pixel_shuffle
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("H"))
def test_chat(case, tmp_path):
    config, params = case.load(tmp_path)
    config = replace(config, image_token_id=case.info["img_context_token_id"])
    assert config.tokens_per_image == case.info["num_image_token"]
    compare = cases.Comparison(case)
    features(case, config, params, compare)
    logits = all_logits(case, config, params, compare)
    for name in compare.names("loss"):
        kind = name.removeprefix("loss_")
        weighted = kind == "weighted"
        # The weights' common factor cancels, so that positions themselves will do.
        batch = next(n for n in logits if f"in.labels_{n}" in case.tensors) if weighted else kind
        labels = case.inputs(f"labels_{batch}")
        weights = np.broadcast_to(np.arange(labels.shape[1]) + 1.0, labels.shape)
        loss = losses.next_token(logits[batch], labels, weights if weighted else None)
        compare.close(name, np.asarray(loss)[None])
    text = case.config["llm_config"]
    for name in compare.names(""):
        expected = compare.expected(name)
        beams = re.fullmatch(r"beam(\d+)", name)
        assert name == "greedy" or beams, name
        # Recorded greedily for the left-padded batch, with beams for a single tile.
        prompt, width = ("1", int(beams[1])) if beams else ("bl", 1)
        ids = answer(case, config, params, prompt, expected.shape[1] - 1, text, width)
        assert np.array_equal(ids, expected[:, 1:]), name
    compare.done()


@pytest.mark.parametrize(**cases.parameters("H2"))
def test_native_chat(case, tmp_path):
    config, params = case.load(tmp_path)
    config = replace(config, image_token_id=case.info["image_token_id"])
    assert config.tokens_per_image == case.info["image_seq_length"]
    compare = cases.Comparison(case)

    @jax.jit
    def tower(params, pixels):
        return bind(config, params).vit(pixels, hidden_states=True)

    pixels = next(case.pixels(n) for n in prompts(case, "px_") if len(case.pixels(n)) == 1)
    last, states = tower(params, pixels)
    for layer, state in enumerate(states):
        compare.close(f"vision_hidden_{layer}", state)
    compare.close("vision_last", last)
    features(case, config, params, compare)
    all_logits(case, config, params, compare)
    expected = compare.expected("greedy")
    for name in prompts(case, "ids_"):
        ids = case.inputs(name)
        if len(ids) == len(expected) and np.array_equal(expected[:, : ids.shape[1]], ids):
            new = expected[:, ids.shape[1] :]
            text = case.config["text_config"]
            result = answer(case, config, params, name[4:], new.shape[1], text)
            assert np.array_equal(result, new)
            break
    else:
        raise AssertionError("the recorded continuation starts with none of the prompts")
    compare.done()


def prompts(case, prefix):
    """Recorded inputs whose name starts like this."""
    names = sorted(name[3:] for name in case.tensors if name.startswith("in."))
    return [name for name in names if name.startswith(prefix)]


def features(case, config, params, compare):
    """Projected features, and the shuffled patches before the projector."""

    @jax.jit
    def run(params, pixels):
        model = bind(config, params)
        _, states = model.vit(pixels, hidden_states=True)
        patches = states[config.select_layer][:, 1:]
        shuffled = pixel_shuffle(patches, config.shuffle, config.shuffle_version)
        return shuffled, model.image_features(pixels)

    for name in compare.names("feat_"):
        kind = name.removeprefix("feat_")
        shuffled, projected = run(params, case.pixels(f"px_{kind}"))
        compare.close(name, projected)
        if f"shuffled_{kind}" in compare:
            side = int(shuffled.shape[1] ** 0.5)
            grid = shuffled.reshape(len(shuffled), side, side, -1)
            compare.close(f"shuffled_{kind}", grid)


def all_logits(case, config, params, compare):
    """{batch: logits}, each compared where its mask is 1."""
    results = {}
    for name in compare.names("logits_"):
        kind = name.removeprefix("logits_")
        ids, valid, images, present = batch_of(case, config, kind)

        @jax.jit
        def run(params, ids, images, valid, present):
            return bind(config, params)(ids, images, valid=valid, present=present)

        results[kind] = run(params, ids, images, valid, present)
        compare.close(name, results[kind], valid)
    return results


def answer(case, config, params, kind, length, text, beams=1):
    """The continuation of the prompts of one batch."""
    ids, valid, images, _ = batch_of(case, config, kind)
    decoding = Decoding(
        max_new_tokens=length,
        num_beams=beams,
        stop_ids=(text["eos_token_id"],),
        pad_id=text["pad_token_id"],
    )

    @jax.jit
    def run(params, ids, images, valid):
        return generate.answer(bind(config, params), ids, images, decoding, valid=valid)

    return np.asarray(run(params, ids, images, valid).ids)[:, 0]


def batch_of(case, config, kind):
    """(ids [B, T], valid [B, T], images [B, M, H, W, 3], present [B, M]) of a recorded batch.

    The official program takes the tiles of all rows in one sequence: a row's share shows in the
    number of its image positions. Tiles flagged as absent go with the row that comes next.
    """
    if f"in.ids_{kind}" in case.tensors:
        ids = case.inputs(f"ids_{kind}")
        needed = np.sum(ids == config.image_token_id) // config.tokens_per_image
        tiles = next(
            case.pixels(n)
            for n in prompts(case, "px_")
            if n[3:].isdigit() and len(case.pixels(n)) == needed
        )
        flags = np.ones(len(tiles), bool)
    else:  # one prompt, some tiles absent
        tiles, (flags,) = case.pixels(f"px_{kind}"), [
            case.inputs(n) > 0 for n in prompts(case, "flags_") if not case.inputs(n).all()
        ]
        ids = case.inputs(f"ids_{np.sum(flags)}")
    valid = np.ones(ids.shape, bool)
    if f"in.mask_{kind}" in case.tensors:
        valid = case.inputs(f"mask_{kind}") > 0
    rows, start = [], 0
    for row in ids:
        wanted = np.sum(row == config.image_token_id) // config.tokens_per_image
        stop = start
        while np.sum(flags[start:stop]) < wanted:
            stop += 1
        rows.append((tiles[start:stop], flags[start:stop]))
        start = stop
    most = max(len(flag) for _, flag in rows)
    images = np.zeros((len(ids), most, *tiles.shape[1:]), np.float32)
    present = np.zeros((len(ids), most), bool)
    for n, (some, flag) in enumerate(rows):
        images[n, : len(some)], present[n, : len(some)] = some, flag
    return ids, valid, images, present
