"""`internvl-jax data convert`: any source as ArrayRecord files."""

import argparse
import json
import sys

from internvl_jax.commands import Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Write data as ArrayRecord files; the same call again goes on where it was interrupted."""
    parser.add_argument("source", metavar="SRC", help=PATH_HELP)
    parser.add_argument("target", metavar="DST", help="DST-00000-of-00012.array_record … are made")
    parser.add_argument(
        "--shard_records", type=int, default=10_000, help="per file; default: %(default)s"
    )

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data import export

        def tell(line: str) -> None:
            print(line, file=sys.stderr)

        figures = export.write(
            args.source, args.target, shard_records=args.shard_records, tell=tell
        )
        if args.json:
            print(json.dumps(figures))
        else:
            print("{records} records in {files} files; skipped: {skipped}".format(**figures))

    return run
