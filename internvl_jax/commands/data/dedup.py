"""`internvl-jax data dedup`: the list of records without near-duplicates and evaluation images."""

import argparse

from internvl_jax.commands import Run
from internvl_jax.commands.data.filter import BEAM_HELP, show


def build(parser: argparse.ArgumentParser) -> Run:
    """Leave out near-duplicates of scored records and evaluation images, with Apache Beam."""
    parser.add_argument("scores", metavar="FOLDER", help="score files of `data score`")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="list for ?keep=")
    parser.add_argument(
        "--by", default="images", help="images, captions or both; default: %(default)s"
    )
    parser.add_argument(
        "--exclude", metavar="FOLDER", help="score files of evaluation data to keep out"
    )
    parser.add_argument("--beam", action="append", default=[], metavar="FLAG", help=BEAM_HELP)

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data.curate import matching, pipelines

        kinds = [word.strip() for word in args.by.split(",")]
        if unknown := set(kinds) - set(matching.KINDS):
            raise ValueError(
                f"cannot compare by {', '.join(unknown)}; use {', '.join(matching.KINDS)}"
            )
        figures = pipelines.deduplicate(
            args.scores, args.out, kinds=kinds, exclude=args.exclude, flags=args.beam
        )
        show(figures, args.json)

    return run
