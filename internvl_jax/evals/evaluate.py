"""Evaluation of one model: figures by name, and what a report shows of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from internvl_jax.evals import evaluator
from internvl_jax.models import ModelConfig


def evaluate(
    model_config: ModelConfig,
    params: dict,
    names: Sequence[str] = (),
    experiment: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Figures of a model on the embedded data, {"zero_shot.scenes.en": 0.71, …}.

    Args:
        names: evaluators to run; without any, those of the embedded job that the model can serve.
        experiment: a run's config, as it is stored in a checkpoint: its `evals` give the
            evaluators' options and its `data` the tokenizer, text length and languages.

    Raises:
        EvaluatorError: an unknown evaluator, or one that needs another kind of model.
    """
    return evaluate_with(model_config, params, names, experiment)[0]


def evaluate_with(
    model_config: ModelConfig,
    params: dict,
    names: Sequence[str] = (),
    experiment: Mapping[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """As `evaluate`, with the evaluators' details beside the figures: {"retrieval": {…}, …}."""
    suited = evaluator.suited(model_config)
    options = dict((experiment or {}).get("evals", {}))
    built = evaluator.build({n: options.get(n, {}) for n in names or suited}, experiment)
    possible = evaluator.possible(model_config)
    wrong = [name for name in built if name not in possible]
    if wrong:
        kind = type(model_config).__name__.removesuffix("Config")
        raise evaluator.EvaluatorError(
            f"evaluator {wrong[0]!r} needs another kind of model than this {kind}; "
            f"it serves {', '.join(possible) or 'none of them'}"
        )
    figures = {
        f"{name}.{key}": value
        for name, one in built.items()
        for key, value in one.run(model_config, params)
    }
    return figures, {name: one.details for name, one in built.items()}
