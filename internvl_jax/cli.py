"""The command line `internvl-jax`: each subcommand parses its arguments and makes one call.

Exit codes: 0 done; 1 an error that the message explains; 2 a command, flag or config that does
not exist; 130 interrupted; 143 ended by SIGTERM after saving. Errors of the user are one line;
anything unexpected keeps its traceback.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from internvl_jax import configuration

CONFIG_HELP = "config file or shipped name, with an optional :argument (stage1_contrastive:tiny)"


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest valid names."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _train(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Train by a config; a second run with the same --workdir resumes the first."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints and metrics")

    def run(args: argparse.Namespace) -> None:
        config = configuration.load(args.config, args.overrides)
        from internvl_jax.train import loop

        try:
            loop.train(config, args.workdir)
        except KeyboardInterrupt:
            print(
                f"interrupted; the same command continues from the last checkpoint in "
                f"{args.workdir}",
                file=sys.stderr,
            )
            sys.exit(130)

    return run


def _evaluate(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Evaluate a checkpoint and print one line per figure."""
    parser.add_argument("--checkpoint", required=True, help='work directory, or "demo"')
    parser.add_argument("--evals", required=True, help="comma-separated, or all of the config's")
    parser.add_argument("--config", help=f"{CONFIG_HELP}; default: the checkpoint's own")
    parser.add_argument("--json", help="also write the figures to this file")

    def run(args: argparse.Namespace) -> None:
        config = configuration.load(args.config, args.overrides) if args.config else None
        from internvl_jax.evals import evaluate

        metrics = evaluate.evaluate(args.checkpoint, args.evals.split(","), config)
        for name, value in metrics.items():
            print(f"{name} {value:.4f}")
        if args.json:
            Path(args.json).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    return run


def _convert(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Convert a checkpoint between the official PyTorch layouts and this project's."""
    parser.add_argument("source", metavar="SRC", help="file or folder to read")
    parser.add_argument("target", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--layout", required=True, help="name of the PyTorch layout")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import convert

        print(convert.convert(args.source, args.target, args.layout))

    return run


def _demo(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Train all stages on the embedded data, evaluate, export, and write a report."""
    parser.add_argument("--workdir", default="runs/demo", help="default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.demo import job

        job.run(args.workdir)

    return run


COMMANDS = {"train": _train, "evaluate": _evaluate, "convert": _convert, "demo": _demo}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = _parse(words)
    try:
        args.run(args)
    except configuration.ConfigError as error:
        _fail(error, 2)
    except (OSError, ValueError, RuntimeError) as error:
        if not _is_readable(error):
            raise
        _fail(error, 1)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="internvl-jax", description="InternVL in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND")
    parsers = {}
    for name, build in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=build.__doc__, description=build.__doc__)
        parsers[name].set_defaults(run=build(parsers[name]))
    name = words[0] if words else ""
    if not name:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    if name not in COMMANDS and not name.startswith("-"):
        parser.error(f"unknown command {name!r}; {configuration.nearest(name, COMMANDS)}")

    chosen = parsers.get(name, parser)
    takes_config = "--config" in chosen.flags()
    overrides, words = _split_overrides(words) if takes_config else ([], words)
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("-") and flag not in chosen.flags():
            chosen.error(f"unknown flag {flag}; {configuration.nearest(flag, chosen.flags())}")
    args = parser.parse_args(words)
    args.overrides = overrides
    return args


def _split_overrides(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take `--config.key=value` and `--config.key value` out of the arguments."""
    overrides, rest, remaining = [], [], iter(words)
    for word in remaining:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--config.").partition("=")
        overrides.append((key, value if equals else next(remaining, "")))
    return overrides, rest


def _is_readable(error: Exception) -> bool:
    """Whether the message was written for the user.

    An OSError names its file; other errors are ours when this package's own code raised them,
    while those from the depths of a library keep their traceback.
    """
    if isinstance(error, OSError):
        return True
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(origin).resolve().is_relative_to(Path(__file__).resolve().parent)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
