"""Captioning by the published protocol: on the demo model, and scores against their definitions."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from internvl_jax.data import scenes
from internvl_jax.evals import evaluator, scores


@pytest.mark.slow
def test_captions_of_the_demo_have_a_cider_above_that_of_an_untrained_model(figures):
    trained, untrained = figures("captioning", languages=["en", "zh"], count=40)
    for language in ("en", "zh"):
        assert trained[f"embedded.{language}.cider"] >= 1.5
        assert untrained[f"embedded.{language}.cider"] < 0.1
        assert trained[f"embedded.{language}.bleu4"] >= 0.3


@pytest.mark.slow
def test_nocaps_is_read_from_its_files(tmp_path, demo):
    (tmp_path / "nocaps/val").mkdir(parents=True)
    images, annotations = [], []
    for number in range(2):
        pixels = scenes.render([scenes.scene("test_single", number)])[0]
        Image.fromarray(pixels).save(tmp_path / f"nocaps/val/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        annotations += [{"image_id": number, "caption": c} for c in ("a shape", "one shape")]
    data = json.dumps({"images": images, "annotations": annotations})
    (tmp_path / "nocaps/nocaps_val_4500_captions.json").write_text(data)
    options = dict(datasets=["nocaps"], root=str(tmp_path), partial=True, num_beams=1)
    one = evaluator.build({"captioning": options}, demo.experiment)["captioning"]
    found = dict(one.run(demo.config, demo.params))
    assert {f"nocaps.en.{m}" for m in ("cider", "bleu4", "rouge_l")} <= set(found)
    assert one.details["nocaps.en"]["references"][1] == ["a shape", "one shape"]
    assert "not comparable" in one.details["caveat"]


def test_bleu_and_rouge_follow_their_definitions():
    captions = ["a red star above a ring", "a blue cross"]
    references = [["a red star above a blue ring"], ["one blue cross here", "a green cross"]]
    found = scores.bleu_and_rouge(captions, references, "en")
    hits, total = Counter(), Counter()
    for caption, group in zip(captions, references, strict=True):
        for n in (1, 2):
            grams = _grams(caption, n)
            most = Counter()
            for reference in group:
                most |= _grams(reference, n)
            hits[n] += (grams & most).total()
            total[n] += grams.total()
    # The closest references have 7 and 3 words (of equally close ones the shorter), ours 6 and 3.
    brevity = math.exp(1 - 10 / 9)
    assert found["bleu1"] == pytest.approx(brevity * hits[1] / total[1], rel=1e-6)
    wanted = brevity * math.sqrt(hits[1] / total[1] * hits[2] / total[2])
    assert found["bleu2"] == pytest.approx(wanted, rel=1e-6)
    # ROUGE-L: longest common subsequences of 6 (of 6 and 7) and of 2 (precision 2/3, recall 2/3).
    each = [_f(6 / 6, 6 / 7), _f(2 / 3, 2 / 3)]
    assert found["rouge_l"] == pytest.approx(np.mean(each), rel=1e-6)


def _f(precision, recall, beta=1.2):
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
