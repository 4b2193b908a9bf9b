"""Fifty optimizer steps of stages 1 and 2, step by step as PyTorch takes them."""

import functools
import json
import re

import jax
import numpy as np
import pytest

from internvl_jax import convert, objectives
from internvl_jax.convert.safetensors_files import Tensors
from internvl_jax.models import bind, create, from_dict
from internvl_jax.train import optimizer
from internvl_jax.train import state as states
from internvl_jax.train.step import make_train_step

STEPS, SIZE, LENGTH, VOCABULARY, IGNORE = 50, 5, 12, 96, -100
MODEL = from_dict(
    dict(family="internvl", size="tiny", vocab_size=VOCABULARY, cross_every=2, layer_scale=0.5)
)
RATE, B1, B2, EPS, DECAY = 1e-3, 0.9, 0.98, 1e-8, 0.05
SETTINGS = dict(
    learning_rate=((".*", RATE),),
    schedule="constant",
    warmup_steps=0,
    b1=B1,
    b2=B2,
    eps=EPS,
    weight_decay=DECAY,
    no_decay="",
    clip_norm=None,
    layer_decay=(),
)
# Our paths and the official keys of what each stage trains (training.md §1, §2).
STAGES = {
    "contrastive": (
        r"(vit|pool|llama/(embed|blocks|norm))/.*|text_projection|logit_scale",
        r"(vision_model|clip_projector|qllama\.model)\.(?!.*cross_attn\.(norm|\w_proj)).*"
        r"|text_projection|logit_scale",
        "stage1",
    ),
    "generative": (
        r"queries|logit_scale|(cross|pool2|match_head)/.*",
        r"query_tokens|logit_scale|clip_projector2\..*|itm_head\..*|.*\.layers\.\d+\.cross_attn\..*",
        "stage2",
    ),
}


def batch(number):
    """Random pictures and padded texts; now and then an empty caption."""
    rng = np.random.default_rng(number)

    def texts(shortest):
        rows = np.zeros((SIZE, LENGTH), np.int32)
        for row in rows:
            length = rng.integers(shortest, LENGTH + 1)
            row[:length] = [1, *rng.integers(3, VOCABULARY, length - 2), 2]
        return rows

    made = {
        "image": rng.integers(0, 256, (SIZE, 32, 32, 3), np.uint8),
        "positive": texts(3), "negative": texts(3), "text": texts(6), "caption": texts(7),
    }  # fmt: skip
    if number % 5 == 0:
        made["negative"][0] = [1, 2] + [0] * (LENGTH - 2)
        made["text"][1] = [1, 9, 8, 7, 2] + [0] * (LENGTH - 5)
    labels = np.where(made["caption"] > 0, made["caption"], IGNORE)
    labels[:, :4] = IGNORE
    return made | {"caption_labels": labels}


def our_losses(stage, params, trainable):
    tx, _ = optimizer.make_optimizer(
        SETTINGS, states.rules.partition(params, trainable)[0], steps=STEPS
    )
    bind_model = functools.partial(bind, MODEL)
    step = make_train_step(objectives.OBJECTIVES[stage](), bind_model, tx, seed=0)
    state, losses = states.create(jax.tree.map(jax.numpy.copy, params), trainable, tx), []
    for number in range(STEPS):
        state, metrics = step(state, batch(number))
        losses.append(float(metrics["loss"]))
    return losses


def torch_losses(folder, trainable, stage):
    import torch  # not at the top: `make test` collects this file without PyTorch

    from tests.train import torch_stages

    loss = getattr(torch_stages, stage)
    config = json.loads((folder / "config.json").read_text())
    weights = {key: torch.tensor(np.array(array)) for key, array in Tensors(folder).items()}
    trained = {key: w for key, w in weights.items() if re.fullmatch(trainable, key)}
    for tensor in trained.values():
        tensor.requires_grad_()
    # Vectors (biases, scales, the class token) do not decay; the released grouping.
    vectors = [w for w in trained.values() if sum(n > 1 for n in w.shape) == 1]
    others = [w for w in trained.values() if sum(n > 1 for n in w.shape) != 1]
    groups = [
        {"params": others, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0},
    ]  # fmt: skip
    adam = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=EPS)
    losses = []
    for number in range(STEPS):
        tensors = {
            name: torch.tensor(a) if a.dtype == np.uint8 else torch.tensor(a).long()
            for name, a in batch(number).items()
        }
        adam.zero_grad()
        value = loss(weights, config, tensors)
        value.backward()
        adam.step()
        losses.append(float(value.detach()))
    return losses, len(trained)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_step_has_the_loss_of_pytorch(stage, tmp_path):
    ours, official, reference = STAGES[stage]
    params = create(MODEL, jax.random.key(1))
    convert.export(params, MODEL, tmp_path / "start")
    expected, count = torch_losses(tmp_path / "start", official, reference)
    assert count > 10
    result = our_losses(stage, params, ours)
    assert expected[-1] != expected[0]
    np.testing.assert_allclose(result, expected, rtol=1e-4)
