"""`internvl-jax evaluate`: the figures of a checkpoint."""

import argparse
from pathlib import Path

from internvl_jax import configuration
from internvl_jax.commands import CHECKPOINT_HELP, CONFIG_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a checkpoint and print its figures beside the paper's."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
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
        own = configuration.load(args.config, args.overrides).to_dict() if args.config else None
        from internvl_jax import loading
        from internvl_jax.evals import evaluate, evaluator, results, tables

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
            names = list(chosen)
            data = {"text_length": loading.TEXT_LENGTH, **model.experiment.get("data", {})}
            experiment = {"data": data, "evals": chosen}
        if model.tokenizer is not None:
            data = {**experiment.get("data", {}), "tokenizer": str(model.tokenizer.path)}
            experiment["data"] = data
        figures, details = evaluate.evaluate_with(model.config, model.params, names, experiment)
        print(results.table(figures, details))
        kind = type(model.config).__name__.removesuffix("Config")
        if args.json:
            results.write(Path(args.json), figures, details, kind, args.checkpoint)
        if args.page:
            results.page(Path(args.page), figures, details, args.checkpoint)

    return run
