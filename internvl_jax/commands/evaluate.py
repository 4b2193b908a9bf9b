"""`internvl-jax evaluate`: the figures of a checkpoint."""

import argparse
import json
from pathlib import Path

from internvl_jax import configuration
from internvl_jax.commands import CHECKPOINT_HELP, CONFIG_HELP, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Evaluate a checkpoint and print one line per figure."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--evals", default="", help="comma-separated; default: all that it serves")
    parser.add_argument("--config", help=f"{CONFIG_HELP}; default: that of the checkpoint's run")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")

    def run(args: argparse.Namespace) -> None:
        own = configuration.load(args.config, args.overrides).to_dict() if args.config else None
        from internvl_jax import loading
        from internvl_jax.evals import evaluate

        model = loading.load(args.checkpoint)
        names = [name for name in args.evals.split(",") if name]
        experiment = own or model.experiment
        figures = evaluate.evaluate(model.config, model.params, names, experiment)
        for name, value in figures.items():
            print(f"{name} {value:.4f}")
        if args.json:
            text = json.dumps(figures, indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")

    return run
