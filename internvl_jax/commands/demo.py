"""`internvl-jax demo`: the main job on the embedded data."""

import argparse

from internvl_jax.commands import Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Train all stages on the embedded data, evaluate, export, and write a report."""
    parser.add_argument("--workdir", default="runs/demo", help="default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.demo import job

        job.run(args.workdir)

    return run
