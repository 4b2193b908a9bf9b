"""`internvl-jax train`: run or resume one experiment."""

import argparse

from internvl_jax import configuration
from internvl_jax.commands import CONFIG_HELP, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Train by a config; a second run with the same --workdir resumes the first."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints and metrics")
    several = parser.add_argument_group(
        "several processes", "found by themselves on a Cloud TPU, in Slurm and Open MPI"
    )
    several.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    several.add_argument("--num_processes", type=int, metavar="N")
    several.add_argument("--process_id", type=int, metavar="N", help="of this one, from 0")

    def run(args: argparse.Namespace) -> None:
        config = configuration.load(args.config, args.overrides)
        from internvl_jax.train import loop, processes

        with processes.joined(args.coordinator_address, args.num_processes, args.process_id):
            loop.train(config, args.workdir)

    return run
