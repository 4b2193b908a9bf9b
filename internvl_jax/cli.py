"""The command line `internvl-jax`: finds the subcommand (`commands`) and explains errors.

Exit codes: 0 done; 1 an error that the message explains; 2 a command, flag or config that does
not exist; 130 interrupted; 143 ended by SIGTERM after saving. Errors of the user are one line,
or a line and a list; anything unexpected keeps its traceback.
"""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from internvl_jax import configuration


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the nearest valid names."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]

    def inner(self, word: str) -> "_Parser":
        """The parser of a command or verb. Ends the program for one that does not exist."""
        groups = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        if not groups or word.startswith("-"):
            return self
        if word not in groups[0]:
            hint = configuration.nearest(word, groups[0])
            self.error(f"unknown command {word!r}; {hint}")
        return groups[0][word]


COMMANDS = (
    "train",
    "evaluate",
    "embed",
    "generate",
    "chat",
    "serve",
    "web",
    "convert",
    "plan",
    "data",
    "demo",
)


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
    for name in COMMANDS:
        build = importlib.import_module(f"internvl_jax.commands.{name}").build
        command = commands.add_parser(name, help=build.__doc__, description=build.__doc__)
        command.set_defaults(run=build(command))
    name = words[0] if words else ""
    if not name:
        parser.error(f"name a command: {', '.join(COMMANDS)}")

    chosen = parser.inner(name)
    if len(words) > 1:
        chosen = chosen.inner(words[1])
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
