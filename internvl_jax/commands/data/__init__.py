"""`internvl-jax data`: look at data, index, convert and curate them; a file per verb.

A verb's file has `build(parser)` as a command's has; VERBS lists the names.
"""

import argparse
import importlib

from internvl_jax.commands import Run

VERBS = (
    "validate",
    "index",
    "stats",
    "show",
    "ids",
    "convert",
    "score",
    "filter",
    "dedup",
)
PATH_HELP = (
    "file, pattern (shards/{00000..00099}.tar) or folder; where the ending does not tell the "
    "format, FORMAT:PATH"
)


def build(parser: argparse.ArgumentParser) -> Run:
    """Validate, index, look at, convert and curate data (docs/data.md)."""
    verbs = parser.add_subparsers(metavar="VERB")
    for name in VERBS:
        module = importlib.import_module(f"{__name__}.{name}")
        inner = verbs.add_parser(
            name, help=module.build.__doc__, description=module.build.__doc__
        )
        inner.add_argument("--json", action="store_true", help="print JSON")
        inner.set_defaults(run=module.build(inner))

    def run(args: argparse.Namespace) -> None:
        parser.error(f"name what to do: {', '.join(VERBS)}")

    return run
