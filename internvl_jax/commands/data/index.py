"""`internvl-jax data index`: scan files once, so that training opens them at once."""

import argparse
import json

from internvl_jax.commands import Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Index tars, TFRecord, JSON Lines and CSV files, and make parquet readable at random."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help=PATH_HELP)
    parser.add_argument("--workers", type=int, default=1, help="processes; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data import inspection

        figures = inspection.build_index(args.paths, args.workers)
        if args.json:
            print(json.dumps(figures))
        else:
            print("{records} records in {files} files, {seconds:.1f} s".format(**figures))

    return run
