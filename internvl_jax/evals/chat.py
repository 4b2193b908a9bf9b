"""Short answers of the chat model about held-out images."""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from internvl_jax import generate
from internvl_jax.data import conversation, sources, text
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.decoding import Decoding
from internvl_jax.evals import features, scores
from internvl_jax.models import ChatConfig, bind
from internvl_jax.sharding import replicate


@functools.partial(jax.jit, static_argnames=("config", "decoding"))
def _answers(
    params: features.Params, prompts: jax.Array, images: jax.Array, *, config, decoding: Decoding
) -> jax.Array:
    result = generate.answer(bind(config, params), prompts, images[:, None], decoding)
    return replicate(result.ids[:, 0])


def write_answers(
    config: ChatConfig,
    params: features.Params,
    images: np.ndarray,
    questions: list[str],
    tokenizer: Tokenizer,
    template: str,
    decoding: Decoding,
    batch_size: int = 100,
) -> list[str]:
    """One answer to each question about its image, uint8 [N, H, W, 3] or `files.Pictures`."""
    prompts = [
        conversation.encode_chat(
            tokenizer,
            template,
            [(conversation.image_first(question), None)],
            config.tokens_per_image,
        )[0]
        for question in questions
    ]
    # Rounded up, so that another set of questions rarely needs another compilation.
    length = -(-max(len(ids) for ids in prompts) // 16) * 16
    rows = np.zeros((len(prompts), length), np.int32)
    for row, ids in zip(rows, prompts, strict=True):
        row[: len(ids)] = ids
    step = functools.partial(_answers, params, config=config, decoding=decoding)
    ids = features.in_batches(step, (rows, images), batch_size)
    return [tokenizer.decode(row).strip() for row in ids]


@functools.cache
def _named(language: str) -> re.Pattern:
    """Every colour, shape and digit of a language."""
    words = {*text.COLOR_NAMES[language].values(), *text.SHAPES[language].values()}
    words |= set(text.DIGITS[language])
    for forms in text.COLORS[language].values():
        words |= {forms} if isinstance(forms, str) else set(forms)
    alternatives = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    # Chinese words touch; Korean ones may carry a particle or the ending of a question.
    before, after = {
        "zh": ("", ""),
        "ko": (r"(?<!\S)", r"(?=\s|은|는|이|가|인가)"),
    }.get(language, (r"\b", r"\b"))
    return re.compile(f"{before}(?:{alternatives}){after}")


def kind(question: str, language: str) -> str:
    """What a question asks, whatever it asks it about: colours, shapes and digits blanked out."""
    return _named(language).sub("…", question)


@functools.cache
def majority_answers(languages: tuple[str, ...], scenes: int = 1000) -> dict[tuple[str, str], str]:
    """(language, kind) → the most frequent answer in training: the best a blind model could do."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for source in (sources.EmbeddedScenes("train", scenes), sources.EmbeddedDigits("train")):
        for index in range(len(source)):
            for language, question, answer in source.questions(index):
                if language in languages:
                    counts[language, kind(question, language)][answer] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


@dataclass
class ChatAnswers:
    """Exact match of short answers, after normalisation, on held-out scenes and digits.

    Figures: `accuracy`, `accuracy.<lang>`; `majority_baseline`: what always giving the most
    frequent training answer to each kind of question reaches.

    `details`: "images" uint8 [N, H, W, 3]; and lists of length N: "languages", "questions",
    "kinds", "answers" (the model's), "expected", "right", "baseline".
    """

    tokenizer: Tokenizer
    languages: tuple[str, ...] = text.LANGUAGES
    template: str = "brief"
    scenes: int = 150
    digits: int = 50
    max_new_tokens: int = 24
    num_beams: int = 1
    batch_size: int = 100
    every: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def run(self, config: ChatConfig, params: features.Params) -> Iterator[tuple[str, float]]:
        """Evaluate, yielding (name, value)."""
        images, asked = self._questions(config.input_size)
        decoding = Decoding(
            max_new_tokens=self.max_new_tokens,
            num_beams=self.num_beams,
            stop_ids=(self.tokenizer.eos_id,),
        )
        languages, questions, expected = map(list, zip(*asked, strict=True))
        answers = write_answers(
            config,
            params,
            images,
            questions,
            self.tokenizer,
            self.template,
            decoding,
            self.batch_size,
        )
        kinds = [kind(q, x) for x, q, _ in asked]
        majority = majority_answers(tuple(self.languages))
        baseline = [majority.get(key, "") for key in zip(languages, kinds, strict=True)]
        right = _equal(answers, expected)
        self.details = {
            "images": images,
            "languages": languages,
            "questions": questions,
            "kinds": kinds,
            "answers": answers,
            "expected": expected,
            "right": right,
            "baseline": baseline,
        }
        yield "accuracy", float(right.mean())
        yield "majority_baseline", float(_equal(baseline, expected).mean())
        for language in self.languages:
            yield f"accuracy.{language}", float(right[np.array(languages) == language].mean())

    def _questions(self, size: int) -> tuple[np.ndarray, list[tuple[str, str, str]]]:
        """Images [N, H, W, 3] and (language, question, answer), one per image and language.

        Which of an image's questions is asked is drawn once for all runs.
        """
        rng = np.random.default_rng(0)
        images, asked = [], []
        for source, count in (
            (sources.EmbeddedScenes("test", image_size=size), self.scenes),
            (sources.EmbeddedDigits("test", size), self.digits),
        ):
            for index in range(count):
                for language in self.languages:
                    choices = [q for q in source.questions(index) if q[0] == language]
                    asked.append(choices[rng.integers(len(choices))])
                    images.append(source.image(index))
        return np.stack(images), asked


def _equal(answers: list[str], expected: list[str]) -> np.ndarray:
    pairs = zip(answers, expected, strict=True)
    return np.array([scores.normalise_answer(a) == scores.normalise_answer(e) for a, e in pairs])
