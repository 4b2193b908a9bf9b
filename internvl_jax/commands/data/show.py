"""`internvl-jax data show`: a page of examples as the model sees them."""

import argparse
import json
from pathlib import Path

from internvl_jax import configuration
from internvl_jax.commands import CONFIG_HELP, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Write an HTML page of a config's examples: crop, tiles, tokens, label mask."""
    parser.add_argument("--config", required=True, help=CONFIG_HELP)
    parser.add_argument("--step", type=int, default=0, help="of the batch; default: %(default)s")
    parser.add_argument("--samples", type=int, default=16, help="default: %(default)s")
    parser.add_argument(
        "--out", default="samples.html", metavar="FILE", help="default: %(default)s"
    )

    def run(args: argparse.Namespace) -> None:
        config = configuration.load(args.config, args.overrides)
        from internvl_jax.data import gallery
        from internvl_jax.models import config as models
        from internvl_jax.train.batches import batches_of

        rows = range(min(args.samples, config.batch_size))
        pipeline, tokenizer = batches_of(config, models.from_dict(config.model), rows)
        batch, _, ids = pipeline.batches[args.step]
        places = [pipeline.place(name) for name in ids]
        title = f"{args.config}, {config.data.task}: batch {args.step}"
        Path(args.out).write_text(gallery.page(batch, ids, places, tokenizer, title), "utf-8")
        if args.json:
            print(json.dumps({"file": args.out, "samples": len(ids)}))
        else:
            print(f"wrote {args.out}: {len(ids)} examples")

    return run
