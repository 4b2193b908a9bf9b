"""`internvl-jax evaluate`: the figures of a checkpoint."""

import argparse
from pathlib import Path

from internvl_jax import configuration
from internvl_jax.commands import CHECKPOINT_HELP, CONFIG_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a checkpoint, or answers from elsewhere, and print figures beside the paper's."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    what.add_argument(
        "--predictions",
        metavar="SET:FILE",
        help="answers of a dialogue benchmark or captions (gqa:answers.json); comma-separated",
    )
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument(
        "--evals",
        default="",
        help="comma-separated names; default: the embedded job's, those of --table with one",
    )
    parser.add_argument(
        "--config", help=f"{CONFIG_HELP}; default: that of the checkpoint's run, on embedded data"
    )
    parser.add_argument("--table", help="of the paper, on published data sets (retrieval, xtd, …)")
    parser.add_argument("--data", default="data", help="where those lie; default: %(default)s")
    parser.add_argument("--partial", action="store_true", help="take what is there of them")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--page", metavar="FILE", help="also write an HTML page with plots")

    def run(args: argparse.Namespace) -> None:
        if args.predictions:
            figures, details, kind = *_predicted(args), "predictions"
        else:
            figures, details, kind = _evaluated(args)
        from internvl_jax.evals import page, results

        source = args.checkpoint or args.predictions
        print(results.table(figures, details))
        if args.json:
            results.write(Path(args.json), figures, details, kind, source)
        if args.page:
            page.write(Path(args.page), figures, details, source)

    return run


def _predicted(args: argparse.Namespace) -> tuple[dict[str, float], dict]:
    """Figures of the answers, and what must be said of them."""
    given = [flag for flag in ("evals", "config", "table", "weights") if getattr(args, flag)]
    if given:
        raise configuration.ConfigError(f"--{given[0]} is for a model, not for --predictions")
    from internvl_jax.evals import predictions, scores

    figures: dict[str, float] = {}
    for one in args.predictions.split(","):
        name, mark, file = one.partition(":")
        if not mark:
            raise configuration.ConfigError(f"--predictions={one}: write SET:FILE")
        figures |= predictions.score(name, Path(file), Path(args.data), args.partial)
    captioned = any(name.startswith("captioning.") for name in figures)
    return figures, {"captioning": {"caveat": scores.CAVEAT}} if captioned else {}


def _evaluated(args: argparse.Namespace) -> tuple[dict[str, float], dict, str]:
    """Figures and details of a checkpoint, and the kind of its model."""
    own = configuration.load(args.config, args.overrides).to_dict() if args.config else None
    from internvl_jax import loading
    from internvl_jax.evals import evaluate, evaluator, tables

    names = [name for name in args.evals.split(",") if name]
    try:  # what does not exist is answered before anything is loaded
        words = args.table.split(",") if args.table else []
        chosen = tables.options(words, args.data, args.partial)
        evaluator.build({**{name: {} for name in names}, **chosen})
    except evaluator.EvaluatorError as error:
        raise configuration.ConfigError(str(error)) from error
    model = loading.load(args.checkpoint, weights=args.weights)
    experiment = dict(own or model.experiment)
    if chosen:
        names = names or list(chosen)
        data = {"text_length": loading.TEXT_LENGTH, **model.experiment.get("data", {})}
        experiment = {"data": data, "evals": chosen}
    if model.tokenizer is not None:
        data = {**experiment.get("data", {}), "tokenizer": str(model.tokenizer.path)}
        experiment["data"] = data
    figures, details = evaluate.evaluate_with(model.config, model.params, names, experiment)
    return figures, details, type(model.config).__name__.removesuffix("Config")
