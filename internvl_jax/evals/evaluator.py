"""Evaluators by name: what they have in common, and how a config becomes a set of them."""

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.evals.captioning import Captioning, Captions
from internvl_jax.evals.chat import ChatAnswers
from internvl_jax.evals.probe import Probe
from internvl_jax.evals.retrieval import Relation, Retrieval
from internvl_jax.evals.segmentation import Segmentation
from internvl_jax.evals.video import Video
from internvl_jax.evals.vqa import Vqa
from internvl_jax.evals.zero_shot import ZeroShot
from internvl_jax.models import ChatConfig, InternVLConfig, ModelConfig

# The name is also the first part of every figure: caption.color, chat.accuracy.
EVALUATORS = {
    "zero_shot": ZeroShot,
    "retrieval": Retrieval,
    "relation": Relation,
    "caption": Captioning,
    "chat": ChatAnswers,
    "video": Video,
    "linear_probe": Probe,
    "attention_probe": functools.partial(Probe, kind="attention"),
    "segmentation": Segmentation,
    "captioning": Captions,
    "vqa": Vqa,
    "knn": functools.partial(Probe, kind="knn"),
}
# Fields that the run gives, not the evaluator's own options.
_GIVEN = ("tokenizer", "details")
AT_THE_END = 10**9  # `every` of an evaluator that runs only after the last step


class Evaluator(Protocol):
    """Computes figures of a model; the train loop and `evaluate` use the same objects.

    Attributes:
        every: steps of training between two runs.
        details: what a report shows of the last run (arrays and strings, see each evaluator).
    """

    every: int
    details: dict[str, Any]

    def run(self, model_config: Any, params: dict) -> Iterator[tuple[str, float]]:
        """Yield (name, value); names without the evaluator's own."""


class EvaluatorError(ValueError):
    """An unknown evaluator or option, or one that the model cannot serve."""


def build(
    evals: Mapping[str, Mapping[str, Any]], experiment: Mapping[str, Any] | None = None
) -> dict[str, Evaluator]:
    """Evaluators from {name: options}.

    Args:
        evals: options are the fields of the evaluator's class; `every` may be left out for "after
            the last step only".
        experiment: the config of the run; its data settings (tokenizer, text_length, languages,
            template) are what the evaluators use unless their options say otherwise.

    Raises:
        EvaluatorError: an unknown name or option, with the list of those there are.
    """
    data = dict((experiment or {}).get("data", {}))
    tokenizer = Tokenizer(data.get("tokenizer") or None)
    built = {}
    for name, options in evals.items():
        if name not in EVALUATORS:
            raise EvaluatorError(f"unknown evaluator {name!r}{near(name, EVALUATORS)}")
        cls = EVALUATORS[name]
        fields_of = dataclasses.fields(getattr(cls, "func", cls))
        known = [f.name for f in fields_of if f.name not in _GIVEN]
        unknown = sorted(set(options) - set(known))
        if unknown:
            hint = near(unknown[0], known)
            raise EvaluatorError(f"evaluator {name!r} has no option {unknown[0]!r}{hint}")
        inherited = {k: data[k] for k in ("text_length", "languages", "template") if k in data}
        if inherited.get("template") == "plain":
            del inherited["template"]  # captions only; it cannot ask a question
        fields = {k: v for k, v in inherited.items() if k in known}
        fields = {"every": AT_THE_END, **fields, **options}
        for key, value in fields.items():
            if isinstance(value, list):  # as they come out of JSON
                fields[key] = tuple(value)
        if fields["every"] < 1:
            raise EvaluatorError(f"evaluator {name!r}: every={fields['every']} must be at least 1")
        built[name] = cls(tokenizer=tokenizer, **fields)
    return built


def suited(model_config: ModelConfig) -> tuple[str, ...]:
    """Names of the evaluators that run where none is named: what the embedded job reports."""
    if isinstance(model_config, ChatConfig):
        return ("chat",)
    if isinstance(model_config, InternVLConfig):
        contrastive = ("zero_shot", "retrieval", "relation")
        return contrastive + (("caption",) if model_config.num_queries else ())
    return ()


def possible(model_config: ModelConfig) -> tuple[str, ...]:
    """Names of all evaluators that a model of this kind can serve, when asked for by name."""
    more: tuple[str, ...] = ()
    if isinstance(model_config, ChatConfig):
        more += ("vqa",)
    if isinstance(model_config, InternVLConfig):
        more += ("video", "captioning") if model_config.num_queries else ("video",)
    if hasattr(model_config, "vit"):
        more += ("linear_probe", "attention_probe", "knn", "segmentation")
    return suited(model_config) + more


def near(word: str, choices: Any) -> str:
    """The end of a message about an unknown word: the nearest, and all there are."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; there are {', '.join(choices)}"
