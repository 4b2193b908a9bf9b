"""`internvl-jax convert`: between official weights and checkpoints, in both directions."""

import argparse
import signal
from typing import Any, NoReturn

from internvl_jax.commands import Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Convert official weights to a checkpoint, a checkpoint to official weights, or between."""
    parser.add_argument("source", metavar="SRC", help="official weights, or a work directory")
    parser.add_argument("target", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--layout", required=True, help="of DST: jax, or an official one")
    parser.add_argument("--dtype", help="of the parameters, as bfloat16; default: as they are")
    parser.add_argument(
        "--inspect", action="store_true", help="say what would happen and write nothing"
    )

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import conversion

        planned = conversion.plan(args.source, args.layout, args.dtype)
        print(planned.report(), flush=True)
        if not args.inspect:
            signal.signal(signal.SIGTERM, _terminated)
            files = planned.write(args.target)
            print(f"wrote {args.target}: {', '.join(files)}")

    return run


def _terminated(number: int, frame: Any) -> NoReturn:
    """SIGTERM as an exception, so that what is half written is cleared away."""
    raise SystemExit(143)
