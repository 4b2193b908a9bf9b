"""The metrics against straightforward loops, and against cases worked by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from sklearn import metrics

from internvl_jax.evals import scores


def _unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("captions_per_image", [1, 5])
@pytest.mark.parametrize("block", [7, 1000])
def test_ranks_equal_a_loop_over_sorted_scores(captions_per_image, block):
    rng = np.random.default_rng(0)
    images, texts = _unit(rng, 40, 6), _unit(rng, 40 * captions_per_image, 6)
    owner = rng.permutation(np.repeat(np.arange(40), captions_per_image))
    numbers = np.arange(40)
    for queries, gallery, query_ids, gallery_ids in (
        (images, texts, numbers, owner),
        (texts, images, owner, numbers),
    ):
        rank, hits = scores.ranks(queries, gallery, query_ids, gallery_ids, top=3, block=block)
        for i, query in enumerate(queries):
            order = sorted(range(len(gallery)), key=lambda j: -float(gallery[j] @ query))
            places = [p for p, j in enumerate(order) if gallery_ids[j] == query_ids[i]]
            # Right entries above the best right one do not exist, so its place is its rank.
            assert rank[i] == places[0]
            assert list(hits[i]) == order[:3]
        for k in (1, 5, 10):
            inside = [
                any(
                    gallery_ids[j] == query_ids[i]
                    for j in np.argsort(-gallery @ query, kind="stable")[:k]
                )
                for i, query in enumerate(queries)
            ]
            assert scores.recall(rank, k) == pytest.approx(np.mean(inside))


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_collapsed_features_retrieve_nothing(value):
    same = np.full((20, 4), value)
    rank, _ = scores.ranks(same, same, np.arange(20), np.arange(20))
    assert scores.recall(rank, 10) == 0.0


def test_a_tied_wrong_entry_counts_before_the_right_one():
    gallery = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    rank, _ = scores.ranks(np.array([[1.0, 0.0]]), gallery, np.array([1]), np.array([0, 1, 2]))
    assert rank.tolist() == [1]


def test_ranks_refuse_a_query_without_a_match():
    with pytest.raises(ValueError, match="no match in the gallery"):
        scores.ranks(np.eye(2), np.eye(2), np.array([0, 7]), np.array([0, 1]))


def test_classification_agrees_with_scikit_learn():
    rng = np.random.default_rng(3)
    similar, labels = rng.normal(size=(400, 9)), rng.integers(0, 9, 400)
    found = scores.classification(similar, labels)
    predicted = similar.argmax(axis=1)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, similar, k=5))
    recall = metrics.balanced_accuracy_score(labels, predicted)
    assert found["mean_per_class"] == pytest.approx(recall)


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_equal_scores_classify_nothing(value):
    found = scores.classification(np.full((6, 8), value), np.arange(6))
    assert found == {"top1": 0.0, "top5": 0.0, "mean_per_class": 0.0}


def test_dual_softmax_weighs_a_query_against_the_others():
    similar = np.random.default_rng(4).normal(size=(5, 7))
    found = scores.dual_softmax(similar)
    for j in range(7):
        share = np.exp(similar[:, j]) / sum(math.exp(x) for x in similar[:, j])
        np.testing.assert_allclose(found[:, j], similar[:, j] * share)


def test_confusion_counts_every_pair():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    matrix = scores.confusion(labels, predicted, 5)
    for i in range(5):
        for j in range(5):
            assert matrix[i, j] == np.sum((labels == i) & (predicted == j))


def test_swaps_equal_a_loop():
    rng = np.random.default_rng(2)
    images, texts = _unit(rng, 300, 2, 3), _unit(rng, 300, 2, 3)
    counts = Counter()
    for (i0, i1), (t0, t1) in zip(images, texts, strict=True):
        text = i0 @ t0 > i0 @ t1 and i1 @ t1 > i1 @ t0
        image = i0 @ t0 > i1 @ t0 and i1 @ t1 > i0 @ t1
        counts.update(text=int(text), image=int(image), group=int(text and image))
    result = scores.swaps(images, texts)
    assert result == {name: pytest.approx(counts[name] / 300) for name in counts}
    assert 0.15 < result["text"] < 0.35  # random features stand near the chance of 1/4


def test_a_model_blind_to_the_swap_scores_zero():
    same = np.ones((5, 2, 3))
    assert scores.swaps(same, same) == {"text": 0.0, "image": 0.0, "group": 0.0}


def test_words_by_language():
    assert scores.words("A Red star, by a ring!", "en") == ["a", "red", "star", "by", "a", "ring"]
    assert scores.words("红色的星形。", "zh") == list("红色的星形")
    assert scores.words("빨간 별.", "ko") == ["빨간", "별"]
    assert scores.words("¿Una estrella pequeña?", "es") == ["una", "estrella", "pequeña"]


def _grams(text, n):
    split = text.split()
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def _cosine(caption, reference, n, weight):
    """Clipped similarity of two texts in n-grams weighted by rarity."""
    mine = {g: c * weight(g) for g, c in _grams(caption, n).items()}
    other = {g: c * weight(g) for g, c in _grams(reference, n).items()}
    dot = sum(min(mine[g], other.get(g, 0)) * other.get(g, 0) for g in mine)
    norm = math.hypot(*mine.values()) * math.hypot(*other.values())
    return dot / norm if norm else dot


def _cider(captions, references):
    """CIDEr-D (arXiv 1411.5726 §4, with clipping and the Gaussian length penalty) from its text."""
    count = Counter()  # images in whose references an n-gram occurs
    for group in references:
        count.update({g for text in group for n in range(1, 5) for g in _grams(text, n)})

    def weight(gram):
        return math.log(len(references) / max(1, count[gram]))

    def similarity(caption, reference):
        # The published program measures length in bigrams.
        gap = _grams(caption, 2).total() - _grams(reference, 2).total()
        mean = np.mean([_cosine(caption, reference, n, weight) for n in range(1, 5)])
        return 10 * mean * math.exp(-(gap**2) / 72)

    pairs = zip(captions, references, strict=True)
    return float(np.mean([np.mean([similarity(c, r) for r in group]) for c, group in pairs]))


def test_cider_follows_its_definition():
    captions = ["a red star", "a blue ring above a green square", "a black cross", "two circles"]
    references = [
        ["a red star", "there is a red star"],
        ["a blue ring above a green square", "a green square below a blue ring"],
        ["a white cross", "one large white cross"],
        ["a purple circle", "the circle is purple"],
    ]
    mean, each = scores.cider(captions, references, "en")
    assert mean == pytest.approx(_cider(captions, references), abs=1e-6)
    assert mean == pytest.approx(each.mean())
    assert each[0] > each[2] > each[3]


def test_cider_of_chinese_looks_at_characters():
    references = [["一颗红色的星形"], ["一个蓝色的圆环"], ["一个白色的十字"]]
    right, _ = scores.cider([r[0] for r in references], references, "zh")
    nearly, _ = scores.cider(
        ["一颗红色的圆环", "一个蓝色的圆环", "一个白色的十字"], references, "zh"
    )
    wrong, _ = scores.cider(["猫", "狗", "鸟"], references, "zh")
    assert right > nearly > wrong == 0.0


def test_cider_survives_an_empty_caption():
    mean, each = scores.cider(["", "a red star"], [["a ring"], ["a red star"]], "en")
    assert each[0] == 0.0 and each[1] > 0.0 and np.isfinite(mean)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Red.", "red"),
        (" The  circle ", "circle"),
        ("빨간색입니다.", "빨간색입니다"),
        ("两个。", "两个"),
        ("ＹＥＳ！", "yes"),
        ("an apple a day", "apple day"),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(given, wanted):
    assert scores.normalise_answer(given) == wanted
