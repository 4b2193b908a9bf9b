"""`internvl-jax data validate`: every record that cannot be used, and why."""

import argparse
import json
import sys

from internvl_jax.commands import Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Read and decode every record, and count what is wrong by cause."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help=PATH_HELP)

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data import inspection

        def tell(line: str) -> None:
            print(line, file=sys.stderr)

        verdict = inspection.validate(args.paths, tell)
        if args.json:
            print(json.dumps(verdict.to_json()))
            return
        print(f"{verdict.ok} of {verdict.records} records are good")
        for cause, count in verdict.errors.most_common():
            print(f"{count:8} {cause}")

    return run
