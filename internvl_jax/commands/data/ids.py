"""`internvl-jax data ids`: which records each process sees at each step."""

import argparse
import contextlib
import json

from internvl_jax import configuration
from internvl_jax.commands import CONFIG_HELP, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Print the record ids (SOURCE:RECORD, numbers from 0) of each step and process.

    Nothing but the indices is read, so a record that is bad is listed; with --read the ids are
    those of the records used in the end. A process holds its neighbouring part of the batch.
    """
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--steps", default="0:1", metavar="FIRST:END", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="of each process; default: the config's")
    parser.add_argument("--read", action="store_true", help="read the records, as training does")

    def run(args: argparse.Namespace) -> None:
        first, end = _range(args.steps)
        config = configuration.load(args.config, args.overrides)
        if args.processes < 1 or config.batch_size % args.processes:
            raise ValueError(
                f"batch_size {config.batch_size} does not divide among {args.processes} processes"
            )
        from internvl_jax.models import config as models
        from internvl_jax.train.batches import batches_of

        model_config = models.from_dict(config.model)
        changes = {} if args.workers is None else {"workers": args.workers}
        share = config.batch_size // args.processes
        with contextlib.ExitStack() as stack:
            readers = []
            for process in range(args.processes):
                rows = range(process * share, (process + 1) * share)
                pipeline, _ = batches_of(config, model_config, rows, **changes)
                reader = pipeline.iterate(first) if args.read else pipeline.iterate_ids(first)
                readers.append(stack.enter_context(contextlib.closing(reader)))
            for step in range(first, end):
                for process, reader in enumerate(readers):
                    next(reader)
                    _print(step, process, reader.ids, args.json)

    return run


def _range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise ValueError(f"--steps takes FIRST:END as 0:50, not {text!r}")
    return int(first), int(end)


def _print(step: int, process: int, ids: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"step": step, "process": process, "ids": ids}), flush=True)
    else:
        print(f"step {step} process {process}: {' '.join(ids)}", flush=True)
