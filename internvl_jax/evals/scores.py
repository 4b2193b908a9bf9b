"""The arithmetic of the metrics, on plain numpy arrays.

A score that is tied with the right one, or is not a number, never counts in the model's favour: a
model whose features have collapsed gets 0, not 100 %.
"""

import importlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

CAVEAT = (
    "words split by this project, not by the Java program of the published scores: "
    "near them, not comparable with them"
)


def ranks(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    top: int = 10,
    block: int = 1024,
) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's best match stands in the gallery.

    A gallery entry is right for a query if their ids agree; there may be several (five captions
    of an image), of which the best counts, as in the protocols of Flickr30K and COCO.

    Args:
        queries: [N, E] unit features; gallery: [M, E].
        query_ids, gallery_ids: [N], [M] integers.
        top: how many hits to return for each query.
        block: queries compared at a time, which bounds memory at block × M scores.

    Returns:
        rank [N]: number of wrong entries scoring at least as high as the best right one.
        hits [N, top]: gallery indices, best first.

    Raises:
        ValueError: a query has no right entry.
    """
    orphans = np.setdiff1d(query_ids, gallery_ids)
    if len(orphans):
        raise ValueError(f"{len(orphans)} queries have no match in the gallery: {orphans[:5]}")
    rank, hits = [], []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ gallery.T  # [b, M]
        part = ranks_of_scores(scores, query_ids[start : start + block], gallery_ids, top)
        rank.append(part[0])
        hits.append(part[1])
    return np.concatenate(rank), np.concatenate(hits)


def ranks_of_scores(
    scores: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, top: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """As `ranks`, for scores [N, M] that exist already."""
    right = query_ids[:, None] == gallery_ids[None]
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    hits = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.sum(~right & ~(scores < best), axis=1), hits


def recall(rank: np.ndarray, k: int) -> float:
    """Share of queries with a right entry among the k best."""
    return float(np.mean(rank < k))


def classification(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`top1`, `top5` and `mean_per_class` (mean of the classes' recalls) of scores [N, C].

    Classes without an example do not count in the mean. Ties count against the model.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    above = np.sum(~(scores < own), axis=1) - (own[:, 0] == own[:, 0])  # a NaN is never below
    right = above < 1
    counts = np.bincount(labels, minlength=scores.shape[1])
    recalls = np.bincount(labels, weights=right, minlength=scores.shape[1])
    return {
        "top1": float(right.mean()),
        "top5": float((above < 5).mean()),
        "mean_per_class": float((recalls[counts > 0] / counts[counts > 0]).mean()),
    }


def dual_softmax(scores: np.ndarray) -> np.ndarray:
    """Scores [Q, G] times their softmax over the queries, as the MSR-VTT program has it.

    It lowers gallery entries that many queries like. The queries are scored together, so a figure
    with it is not that of single queries.
    """
    shifted = np.exp(scores - scores.max(axis=0, keepdims=True))
    return scores * shifted / shifted.sum(axis=0, keepdims=True)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[classes, classes] counts; rows are the truth, columns what was predicted."""
    flat = np.asarray(labels, np.int64) * classes + predicted
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def mean_iou(counts: np.ndarray) -> float:
    """Mean over the classes of intersection over union, from a `confusion` of pixels.

    Classes that are neither there nor predicted do not count.
    """
    right = np.diag(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - right
    return float((right[union > 0] / union[union > 0]).mean())


def swaps(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Winoground scores (arXiv 2204.03162 §3.2) of pairs that differ in word order only.

    Args:
        images, texts: [P, 2, E] unit features; texts[p, i] describes images[p, i].

    Returns:
        `text`: share of pairs where each image prefers its own caption; `image`: where each caption
        prefers its own image; `group`: both. Chance is 1/4, 1/4 and 1/6.
    """
    s = np.einsum("pie,pte->pit", images, texts)  # [P, image, text]
    text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    return {
        "text": float(text.mean()),
        "image": float(image.mean()),
        "group": float((text & image).mean()),
    }


def words(text: str, language: str) -> list[str]:
    """Split a caption for n-gram metrics, without punctuation.

    Chinese and Japanese have no spaces: each character is a word there. This is not the Penn
    Treebank tokenizer of the published numbers, which splits English contractions and knows no
    other language: scores through it are not comparable to those.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in text)
    if language in ("zh", "ja"):
        return [c for c in text if not c.isspace()]
    return text.split()


def cider(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str
) -> tuple[float, np.ndarray]:
    """CIDEr of one caption per image against its references, through pycocoevalcap.

    Returns:
        The mean and the score of each image, on the scale where published tables print 100 × it.

    Raises:
        ImportError: pycocoevalcap is missing; says how to install it.
    """
    scorer = _pycocoevalcap("cider.cider", "Cider")
    score, each = scorer.compute_score(*_spaced(captions, references, language))
    return float(score), np.asarray(each)


def bleu_and_rouge(
    captions: Sequence[str], references: Sequence[Sequence[str]], language: str
) -> dict[str, float]:
    """`bleu1` to `bleu4` of the whole set and `rouge_l`, as fractions, through pycocoevalcap."""
    texts = _spaced(captions, references, language)
    bleu, _ = _pycocoevalcap("bleu.bleu", "Bleu").compute_score(*texts, verbose=0)
    rouge, _ = _pycocoevalcap("rouge.rouge", "Rouge").compute_score(*texts)
    return {**{f"bleu{n}": float(x) for n, x in enumerate(bleu, 1)}, "rouge_l": float(rouge)}


def _pycocoevalcap(module: str, name: str):
    """One of the scorers that are pure Python: no Java."""
    try:
        return getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    except ImportError as error:
        raise ImportError(
            "scores of captions need the package pycocoevalcap: pip install 'internvl_jax[eval]'"
        ) from error


def _spaced(captions, references, language):
    """References and captions by image, their words with spaces between, as the scorers want."""
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} sets of references")
    spaced = [[" ".join(words(r, language)) for r in group] for group in references]
    own = {i: [" ".join(words(c, language))] for i, c in enumerate(captions)}
    return dict(enumerate(spaced)), own


def normalise_answer(answer: str) -> str:
    """Short answers as they are compared: lower case, no punctuation, no article, single spaces."""
    text = unicodedata.normalize("NFKC", answer).lower()
    text = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
