"""`internvl-jax embed`: features of a data source in shards on disk."""

import argparse
from pathlib import Path

from internvl_jax.commands import CHECKPOINT_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Write image and text features of a data source to disk; resumable."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument("--source", required=True, help="scenes/test, digits, jsonl:PATH, …")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--mode", default="c", help="InternVL-C or -G; default: %(default)s")
    parser.add_argument("--format", default="npy", help="npy or parquet; default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="or float16; default: %(default)s")
    parser.add_argument("--language", default="en", help="of the captions; default: %(default)s")
    parser.add_argument("--shard_size", type=int, default=10_000, help="default: %(default)s rows")
    parser.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import loading
        from internvl_jax.data import sources
        from internvl_jax.evals import embed

        model = loading.load(args.checkpoint, weights=args.weights)
        if not hasattr(model.config, "embed_dim"):
            raise loading.LoadError(f"embed needs an InternVL-C or -G, not {args.checkpoint}")
        source = sources.open_source(args.source, model.config.vit.image_size)
        output = Path(args.output)
        written = embed.embed(
            model.config,
            model.params,
            source,
            output,
            tokenizer=model.tokenizer,
            mode=args.mode,
            language=args.language,
            text_length=model.experiment.get("data", {}).get("text_length", loading.TEXT_LENGTH),
            file_format=args.format,
            dtype=args.dtype,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            identity={
                "checkpoint": str(args.checkpoint),
                **({"weights": args.weights} if args.weights else {}),
            },
        )
        print(f"{len(source)} rows in {output}, {written} shards written now")

    return run
