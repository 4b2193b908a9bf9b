"""The subcommands of `internvl-jax`, a file each.

A file `<name>.py` has `build(parser)`: it adds the command's arguments to its parser and returns
what runs it. Its docstring is the help text. What is heavy is imported when the command runs, so
that a mistyped flag is answered at once. `cli.COMMANDS` lists the names.
"""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], None]

CONFIG_HELP = "config file or shipped name, with an optional :argument (stage1_contrastive:tiny)"
CHECKPOINT_HELP = 'work directory or step of a run, official weights, or "demo"'
# Of `--weights`.
WEIGHTS = {
    "choices": ("int8",),
    "help": "hold matrices in int8 with a scale per output channel; default: floating point",
}
