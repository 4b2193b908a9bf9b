"""`internvl-jax data stats`: sizes, formats and lengths of a sample of the records."""

import argparse
import json

from internvl_jax.commands import Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Describe data by a sample: image sizes and formats, words, languages."""
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--sample", type=int, default=1000, help="records; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data import inspection

        figures = inspection.statistics(args.path, args.sample)
        if args.json:
            print(json.dumps(figures))
            return
        for name, value in figures.items():
            if isinstance(value, dict):
                value = "  ".join(f"{key} {x:g}" for key, x in value.items()) or "none"
            print(f"{name:10} {value}")

    return run
