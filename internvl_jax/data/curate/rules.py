"""Which records are kept: the six signals of stage 1, and what a caption must be for stage 2.

The paper names the signals and the faults (appendix A.4, Table 2) but no threshold: those here are
ours, set so that only extremes go. A signal that a record does not have removes nothing.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

# Column of a score file → how img2dataset and LAION's metadata call the signal.
SIGNALS = {
    "similarity": ("similarity", "SIMILARITY", "clip_similarity_vitb32"),
    "watermark": ("pwatermark", "watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "nsfw_score_gantman"),
    "aesthetic": ("aesthetic", "AESTHETIC_SCORE", "aesthetic_score_laion_v2"),
}


@dataclasses.dataclass(frozen=True)
class Stage1:
    """Limits of the six signals of stage 1."""

    min_similarity: float = 0.2  # cosine
    max_watermark: float = 0.9  # probability
    max_unsafe: float = 0.9  # probability
    min_aesthetic: float = 3.5  # of 10
    min_side: int = 64  # pixels of the shorter side
    max_aspect: float = 5.0  # longer by shorter side
    min_characters: int = 5
    max_characters: int = 2000

    def fault(self, row: Mapping[str, Any]) -> str | None:
        """The signal for which a record goes, or None."""

        def beyond(name, low=float("-inf"), high=float("inf")):
            value = row.get(name)
            return value is not None and not low <= value <= high

        if beyond("similarity", low=self.min_similarity):
            return "similarity"
        if beyond("watermark", high=self.max_watermark):
            return "watermark"
        if beyond("unsafe", high=self.max_unsafe):
            return "unsafe"
        if beyond("aesthetic", low=self.min_aesthetic):
            return "aesthetic"
        sides = sorted((row["width"], row["height"]))
        if sides[0] < self.min_side or sides[1] > self.max_aspect * sides[0]:
            return "resolution"
        if not self.min_characters <= len(row["caption"].strip()) <= self.max_characters:
            return "caption_length"
        return None


_PLACEHOLDER = re.compile(
    r"^(img|image|dsc|dscn|photo|picture|pic|untitled|unnamed|screenshot|screen shot|default|"
    r"thumbnail|placeholder|no image|no caption|alt text|null|none|n/?a|logo|banner|icon)"
    r"[\s_\-.()\d]*(\.?(jpe?g|png|gif|webp))?$|^[\w\-]+\.(jpe?g|png|gif|webp)$|lorem ipsum",
    re.IGNORECASE,
)
_BOILERPLATE = re.compile(
    r"\b(click here|read more|sign (in|up)|log ?in|subscribe|add to (cart|basket|wishlist)|"
    r"all rights reserved|cookie policy|privacy policy|terms (of|and) (use|service|conditions)|"
    r"free shipping|buy now|page not found|404 (error|not found)|access denied|"
    r"(internal )?server error|javascript (is )?(disabled|required)|error \d{3}|home ?[|>»])",
    re.IGNORECASE,
)
_CODE = re.compile(
    r"</?(div|span|script|img|a|p|br|table)\b[^>]*>|\b(function|def|class|import|return|var|const)"
    r"\b[^.!?]*[({;=]|[{};]\s*$|&[a-z]+;|\bhttps?://|\\[nt]|\$\{|==|=>|::"
)
# A short list by stems, of English alone: for other languages and for judgement there is
# "unsafe", the score of a classifier.
_OFFENSIVE = re.compile(r"\b(fuck|shit|cunt|nigg|faggot|whore|porn|xxx)\w*", re.IGNORECASE)
_SPACELESS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # words there have no spaces


def caption_fault(caption: str) -> str | None:
    """Why a caption is not fit for stage 2, or None: the faults that appendix A.4 lists."""
    text = " ".join(caption.split())
    words = text.split(" ") if text else []
    spaceless = len(_SPACELESS.findall(text))
    length = len(words) + spaceless // 2
    if not 3 <= length <= 120:
        return "length"
    if _PLACEHOLDER.search(text):
        return "placeholder"
    if _CODE.search(text):
        return "source_code"
    if _BOILERPLATE.search(text):
        return "boilerplate"
    if _OFFENSIVE.search(text):
        return "offensive"
    if _repeats(words):
        return "repeated"
    letters = sum(c.isalpha() for c in text)
    if letters < 0.6 * len(text.replace(" ", "")):
        return "gibberish"
    if not spaceless and any(_unreadable(word) for word in words):
        return "readability"
    if text[-1] in ",-–—:;(&/" or text.endswith("..."):
        return "completeness"
    return None


def _repeats(words):
    lower = [word.lower() for word in words]
    often = max(lower.count(word) for word in set(lower))
    return (len(lower) >= 4 and often > len(lower) / 2) or any(
        a == b == c for a, b, c in zip(lower, lower[1:], lower[2:], strict=False)
    )


def _unreadable(word):
    """Longer than words are, or Latin letters without a vowel."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    latin = len(letters) == len(word.strip(".,;:!?'\"()-"))
    return len(word) > 40 or (latin and len(letters) >= 7 and not re.search(r"[aeiouy]", letters))


RULES = ("stage1", "stage2")


def fault(row: Mapping[str, Any], rules: tuple[str, ...], stage1: Stage1) -> str | None:
    """The first reason to leave a record out, or None. A record with an error is left out."""
    if row.get("error"):
        return str(row["error"])
    if "stage1" in rules and (found := stage1.fault(row)):
        return found
    if "stage2" in rules and (found := caption_fault(row["caption"])):
        return f"caption_{found}"
    return None
