"""`internvl-jax data stats`: what a sample of the records is like; how well packing fills rows."""

import argparse
import json

from internvl_jax import configuration
from internvl_jax.commands import CONFIG_HELP, Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Describe data by a sample (sizes, formats, words), or with --config a config's packed rows.

    The latter tells the share of the rows' tokens and squares that data.packing fills, and the
    share of the conversations that find no room.
    """
    parser.add_argument("path", nargs="?", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--sample", type=int, default=1000, help="records; default: %(default)s")
    parser.add_argument("--config", help=CONFIG_HELP)
    parser.add_argument("--steps", type=int, default=4, help="batches; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        if (args.path is None) == (args.config is None):
            raise ValueError("data stats takes a PATH or a --config, one of the two")
        from internvl_jax.data import inspection

        if args.path is not None:
            figures = inspection.statistics(args.path, args.sample)
        else:
            figures = _packing(configuration.load(args.config, args.overrides), args.steps)
        if args.json:
            print(json.dumps(figures))
            return
        for name, value in figures.items():
            if isinstance(value, dict):
                value = "  ".join(f"{key} {x:g}" for key, x in value.items()) or "none"
            print(f"{name:14} {value}")

    return run


def _packing(config, steps: int) -> dict:
    from internvl_jax.data import inspection
    from internvl_jax.models import config as models
    from internvl_jax.train.batches import batches_of

    if not config.data.packing:
        raise ValueError(
            "the config packs nothing; set data.packing, as --config.data.packing=4, to see how "
            "well that many conversations fill a row"
        )
    pipeline, _ = batches_of(config, models.from_dict(config.model))
    return inspection.packing(pipeline.batches, steps)
