"""The rules of stages 1 and 2, by examples of what goes and what stays."""

import pytest

from internvl_jax.data.curate import rules

GOOD = dict(
    error=None, similarity=0.3, watermark=0.1, unsafe=0.0, aesthetic=5.0, width=400, height=300,
    caption="a dog runs on the beach",
)


@pytest.mark.parametrize(
    "change, cause",
    [
        ({}, None),
        (dict.fromkeys(("similarity", "watermark", "unsafe", "aesthetic")), None),
        ({"similarity": 0.1}, "similarity"),
        ({"watermark": 0.95}, "watermark"),
        ({"unsafe": 0.95}, "unsafe"),
        ({"aesthetic": 2.0}, "aesthetic"),
        ({"height": 40}, "resolution"),
        ({"width": 4000}, "resolution"),
        ({"caption": "cat"}, "caption_length"),
        ({"caption": "word " * 500}, "caption_length"),
        ({"error": "corrupt_image", "width": None}, "corrupt_image"),
    ],
)
def test_signals_of_stage_one(change, cause):
    assert rules.fault({**GOOD, **change}, ("stage1",), rules.Stage1()) == cause


@pytest.mark.parametrize(
    "caption, cause",
    [
        ("A dog runs on the beach.", None),
        ("Portrait of an old man with a hat, 1890", None),
        ("一只猫坐在窗台上看着外面的鸟", None),
        ("una estrella roja a la izquierda de un círculo", None),
        ("해변에서 개가 뛰고 있다", None),
        ("rhythm and blues concert", None),
        ("dog", "length"),
        ("word " * 130, "length"),
        ("photo (12) .jpg", "placeholder"),
        ("lorem ipsum dolor sit amet", "placeholder"),
        ("function f(x) { return x; }", "source_code"),
        ("see https://example.com for more", "source_code"),
        ("<div class='x'> a dog </div>", "source_code"),
        ("Home | Products | Sign in", "boilerplate"),
        ("404 error page not found here", "boilerplate"),
        ("Add to cart the red shoes", "boilerplate"),
        ("dog dog dog dog beach", "repeated"),
        ("$$ 12/34 -- 99.9 %% cat", "gibberish"),
        ("a xkcdvbnm on the table", "readability"),
        ("a view of the city from the,", "completeness"),
        ("this picture shows the great...", "completeness"),
    ],
)
def test_faults_of_captions(caption, cause):
    assert rules.caption_fault(caption) == cause


def test_both_stages_together():
    row = {**GOOD, "caption": "dog dog dog dog"}
    assert rules.fault(row, ("stage1",), rules.Stage1()) is None
    assert rules.fault(row, ("stage1", "stage2"), rules.Stage1()) == "caption_repeated"
    assert rules.fault(row, ("stage1", "stage2"), rules.Stage1(min_characters=20)) == (
        "caption_length"
    )
