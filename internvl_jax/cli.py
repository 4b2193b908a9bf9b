"""The command line `internvl-jax`: each subcommand parses its arguments and makes one call.

Exit codes: 0 done; 1 an error that the message explains; 2 a command, flag or config that does
not exist; 130 interrupted; 143 ended by SIGTERM after saving. Errors of the user are one line,
or a line and a list; anything unexpected keeps its traceback.
"""

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from internvl_jax import configuration

CONFIG_HELP = "config file or shipped name, with an optional :argument (stage1_contrastive:tiny)"

CHECKPOINT_HELP = 'work directory or step of a run, official weights, or "demo"'


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


def _evaluate(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Evaluate a checkpoint and print one line per figure."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--evals", default="", help="comma-separated; default: all that it serves")
    parser.add_argument("--config", help=f"{CONFIG_HELP}; default: that of the checkpoint's run")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")

    def run(args: argparse.Namespace) -> None:
        own = configuration.load(args.config, args.overrides).to_dict() if args.config else None
        from internvl_jax import loading
        from internvl_jax.evals import evaluate

        model = loading.load(args.checkpoint)
        names = [name for name in args.evals.split(",") if name]
        experiment = own or model.experiment
        figures = evaluate.evaluate(model.config, model.params, names, experiment)
        for name, value in figures.items():
            print(f"{name} {value:.4f}")
        if args.json:
            text = json.dumps(figures, indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")

    return run


def _generate(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Describe an image, or answer a question about it."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--question", help="ask this of a chat model instead of a caption")
    parser.add_argument("--language", default="en", help="of the caption; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import loading
        from internvl_jax.data import image

        picture = image.read(args.image)
        model = loading.load(args.checkpoint)
        if args.question:
            print(model.chat(picture, args.question))
        else:
            print(*model.caption([picture], args.language))

    return run


def _convert(parser: _Parser) -> Callable[[argparse.Namespace], None]:
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


def _plan(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Compile a config's train step for a TPU pod, without a TPU: memory, traffic, time."""
    modes = ("encode", "prefill", "decode")
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--topology", required=True, help="chip and slice, as v5e:16x16")
    parser.add_argument("--inference", choices=modes, help="plan this call, not the train step")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--dump", metavar="FILE", help="keep the compiled program's text here")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.plan import chips

        chips.parse(args.topology)  # before anything is loaded
        config = configuration.load(args.config, args.overrides)
        os.environ["JAX_PLATFORMS"] = "cpu"  # the pod's devices exist only in the compiler
        from internvl_jax.plan import plan

        answer = plan.make(config, args.topology, args.dump, args.inference)
        print(answer)
        if args.json:
            print(json.dumps(answer.to_dict()))

    return run


def _demo(parser: _Parser) -> Callable[[argparse.Namespace], None]:
    """Train all stages on the embedded data, evaluate, export, and write a report."""
    parser.add_argument("--workdir", default="runs/demo", help="default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.demo import job

        job.run(args.workdir)

    return run


COMMANDS = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "convert": _convert,
    "plan": _plan,
    "demo": _demo,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = _parse(words)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except configuration.ConfigError as error:
        _fail(error, 2)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
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
    # A list of ours, as of keys that do not fit, keeps its lines.
    text = str(error) if "\n  " in str(error) else " ".join(str(error).split())
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
