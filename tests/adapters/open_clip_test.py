"""The open_clip-like triple, and CLIP_benchmark's own evaluators and metrics on it."""

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import internvl_jax
from internvl_jax.data import sources, text
from internvl_jax.evals import prompts, scores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def triple():
    from internvl_jax.adapters import clip_benchmark

    return clip_benchmark.load("internvl_c", "demo", cache_dir=None, device="cpu")


@pytest.fixture(scope="module")
def batches(triple):
    """Twenty-four pictures with two captions each, as CLIP_benchmark's loaders give them."""
    import torch

    source = sources.EmbeddedScenes("test", 24)
    pictures = [triple[1](Image.fromarray(source.image(i))) for i in range(24)]
    captions = [list(source.texts(i)["captions"]["en"][:2]) for i in range(24)]
    return [(torch.stack(pictures[i : i + 8]), captions[i : i + 8]) for i in range(0, 24, 8)]


def test_features_are_those_of_the_loaded_model(triple, batches):
    encoder, _, tokenizer = triple
    model = internvl_jax.load("demo")
    found = encoder.encode_image(batches[0][0])
    wanted = model.encode_image(sources.EmbeddedScenes("test", 24).images[:8])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)
    texts = ["a red star", "two circles"]
    found = encoder.encode_text(tokenizer(texts), normalize=True)
    wanted = model.encode_text(texts)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_retrieval_of_clip_benchmark_agrees_with_ours(triple, batches):
    from clip_benchmark.metrics import zeroshot_retrieval

    encoder, _, tokenizer = triple
    theirs = zeroshot_retrieval.evaluate(
        encoder, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5]
    )
    images = np.concatenate([encoder.encode_image(x, normalize=True) for x, _ in batches])
    flat = [caption for _, own in batches for pair in own for caption in pair]
    texts = encoder.encode_text(tokenizer(flat), normalize=True).numpy()
    numbers, owners = np.arange(24), np.repeat(np.arange(24), 2)
    for k in (1, 5):
        rank, _ = scores.ranks(images, texts, numbers, owners)
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(scores.recall(rank, k))
        rank, _ = scores.ranks(texts, images, owners, numbers)
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(scores.recall(rank, k))
    assert theirs["text_retrieval_recall@5"] >= 0.8


def test_classification_of_clip_benchmark_agrees_with_ours(triple):
    """Its classifier and its logits; its `accuracy` does not run with this numpy."""
    import torch
    from clip_benchmark.metrics import zeroshot_classification as theirs

    encoder, preprocess, tokenizer = triple
    source = sources.EmbeddedDigits("test")
    labels = source.labels[:40]
    pictures = torch.stack([preprocess(Image.fromarray(source.image(i))) for i in range(40)])
    names = list(text.DIGITS["en"])
    classifier = theirs.zero_shot_classifier(
        encoder, tokenizer, names, ["the handwritten digit {c}"], "cpu", amp=False
    )
    logits, target = theirs.run_classification(
        encoder, classifier, [(pictures, torch.tensor(labels))], "cpu", amp=False
    )
    ours = scores.classification(logits.numpy(), labels)
    for k, name in ((1, "top1"), (5, "top5")):
        best = logits.topk(k, dim=1).indices.numpy()
        inside = (best == target.numpy()[:, None]).any(axis=1)
        assert ours[name] == pytest.approx(inside.mean())
    assert ours["top1"] >= 0.8


def test_the_loader_fits_the_table_of_clip_benchmark():
    """Its package asks for open_clip when it is imported, so its contract is read from its text."""
    folder = importlib.util.find_spec("clip_benchmark").submodule_search_locations[0]
    tree = ast.parse((Path(folder) / "models" / "__init__.py").read_text())
    names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    assert {"TYPE2FUNC", "MODEL_TYPES"} <= names
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    (call,) = [n for n in ast.walk(function) if isinstance(n, ast.Return)]
    given = {keyword.arg for keyword in call.value.keywords}
    assert given == {"model_name", "pretrained", "cache_dir", "device"}


def test_prompts_are_those_of_clip_benchmark():
    made = prompts.build("imagenet1k", "en", sorted(prompts._wnids()))
    assert len(made.classes) == 1000 and {len(texts) for texts in made.texts} == {80}
    assert made.classes[0] == "tench" and "CLIP_benchmark, 80 templates" in made.source
    counts = {"zh": 80, "ja": 37, "ar": 55, "it": 49}
    for language, count in counts.items():
        made = prompts.build("imagenet1k", language, sorted(prompts._wnids()))
        assert len(made.texts[999]) == count
    assert prompts.build("imagenet1k", "en", ["0", "7"]).classes == ["tench", "rooster"]
    assert len(prompts.build("mnist", "en", [str(n) for n in range(10)]).classes[0]) == 1
