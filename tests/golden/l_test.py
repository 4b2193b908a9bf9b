"""L: the losses of stage 2 and of retrieval fine-tuning, their terms, logits and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internvl_jax import losses
from internvl_jax.convert import internvl
from internvl_jax.convert.mapping import TorchTensors
from internvl_jax.kernels import Full, Keys, Prefix, Separate
from internvl_jax.models import bind
from internvl_jax.objectives import OBJECTIVES
from internvl_jax.rules import flatten
from tests.golden import cases


@pytest.mark.parametrize(**cases.parameters("L"))
def test_losses_and_gradients(case, tmp_path):
    config, params = case.load(tmp_path)
    compare = cases.Comparison(case)
    retrieval = "in.image_ids" in case.tensors
    batch = make_batch(case, retrieval)
    if retrieval:
        objective = OBJECTIVES["retrieval"]()
    else:
        smoothing = case.config["label_smoothing"]
        objective = OBJECTIVES["generative"](label_smoothing=smoothing)

    def loss(params):
        return objective(bind(config, params), batch)

    (_, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    compare.close("loss", metrics["loss"][None])
    for term in ("itm", "itc", "itg"):
        if f"loss_{term}" in compare:
            compare.close(f"loss_{term}", metrics[term][None])
    terms(config, params, batch, retrieval, compare)
    compare_gradients(case, config, gradients, compare)
    compare.done()


def make_batch(case, retrieval):
    """The recorded inputs as one of our batches, whose padding is id 0."""

    def ids(name):
        mask = (
            "attention_mask" if name == "input_ids" else name.replace("input_ids", "attention_mask")
        )
        valid = case.inputs(mask) > 0
        ids = np.where(valid, case.inputs(name), 0)
        np.testing.assert_array_equal(ids > 0, valid)
        return ids

    batch = {
        "image": case.pixels("pixel_values"),
        "positive": ids("positive_input_ids"),
        "negative": ids("negative_input_ids"),
        "text": ids("summarize_input_ids"),
    }
    if retrieval:
        return batch | {"image_id": case.inputs("image_ids")[:, 0]}
    return batch | {"caption": ids("input_ids"), "caption_labels": case.inputs("labels")}


def terms(config, params, batch, retrieval, compare):
    """The logits that each cross-entropy gets, and its value with the recorded targets."""
    size = batch["image"].shape[0]

    @jax.jit
    def run(params, batch):
        model = bind(config, params)
        vision = model.vision(batch["image"])
        count = config.num_queries

        def states(ids, mask, vision=vision):
            x = [model.query_embeddings(ids.shape[0]), model.llama.embed_tokens(ids)]
            valid = jnp.concatenate([jnp.ones((ids.shape[0], count), bool), ids > 0], axis=1)
            x = jnp.concatenate(x, axis=1)
            hidden = model.middleware(x, vision, mask=mask & Keys(valid))[0]
            return hidden[:, :count], hidden[:, count:]

        def match(ids):
            return model.match_logits(states(ids, Full())[0])

        if retrieval:
            both = [match(batch["negative"]), match(batch["positive"])]
            return {"itm": jnp.concatenate(both)}
        negatives = size - size // 2
        half = [batch["negative"][:negatives], batch["positive"][negatives:]]
        queries, text = states(batch["text"], Separate(count))
        features = model.project_text(text, batch["text"] > 0)
        scale = model.logit_scale[...]
        i2t, t2i = losses.similarities(model.pool2(queries), features, scale)
        captions = model.llama.logits(states(batch["caption"], Prefix(count))[1])[:, :-1]
        return {
            "itm": match(jnp.concatenate(half)),
            "itc_i2t": i2t,
            "itc_t2i": t2i,
            "itg": captions.reshape(-1, captions.shape[-1]),
        }

    for term, logits in run(params, batch).items():
        targets = compare.expected(f"{term}_targets")
        # Recorded logits of padding positions count as rows whose mask is 0.
        rows = targets != losses.IGNORE if term == "itg" else None
        compare.close(f"{term}_logits", logits, rows)
        smoothing = compare.case.config["label_smoothing"] if term.startswith("itc") else 0.0
        value = losses.cross_entropy(logits, jnp.asarray(targets), smoothing)
        compare.close(f"{term}_ce", value[None])


def compare_gradients(case, config, gradients, compare):
    """Gradients under the official keys: the recorded ones, and the norm of every parameter.

    The official gradient of a parameter outside the loss is None, ours is zero.
    """
    tensors = TorchTensors(internvl.rules(config), flatten(gradients))
    norms = case.info["grad_norms"]["per_parameter"]
    assert norms.keys() == tensors.specs.keys()
    total = 0.0
    for key, norm in norms.items():
        norm = norm or 0.0
        gradient = tensors.read(key)
        result = np.linalg.norm(gradient.astype(np.float64))
        total += result**2
        bound = cases.RELATIVE_GRADIENT * norm + cases.ABSOLUTE_GRADIENT
        assert abs(result - norm) <= bound, f"norm of {key} is {result}, recorded {norm}"
        if f"grad.{key}" in compare:
            compare.gradient_close(key, gradient, compare.expected(f"grad.{key}"))
    np.testing.assert_allclose(
        np.sqrt(total), case.info["grad_norms"]["all"], rtol=cases.RELATIVE_GRADIENT
    )
