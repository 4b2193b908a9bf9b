"""`internvl-jax data score`: similarity, signals and hashes of every record, a file per shard."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from internvl_jax.commands import CHECKPOINT_HELP, Run
from internvl_jax.commands.data import PATH_HELP


def build(parser: argparse.ArgumentParser) -> Run:
    """Score records, one parquet file per shard; again, it writes only what is missing."""
    parser.add_argument("path", metavar="PATH", help=PATH_HELP)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="of the score files")
    parser.add_argument(
        "--checkpoint", help=f"{CHECKPOINT_HELP}; without it the metadata's similarity stands"
    )
    parser.add_argument("--mode", choices=("c", "g"), default="c", help="InternVL-C or -G")
    parser.add_argument(
        "--part", default="0/1", metavar="K/N", help="every N-th shard from the K-th on"
    )

    def run(args: argparse.Namespace) -> None:
        from internvl_jax.data.curate import scoring

        first, _, count = args.part.partition("/")
        if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
            raise ValueError(f"--part takes K/N with K below N, as 0/8, not {args.part!r}")
        encoder = Encoder(args.checkpoint, args.mode) if args.checkpoint else None

        def tell(line: str) -> None:
            print(line, file=sys.stderr)

        figures = scoring.score(
            args.path, args.out, encoder, part=(int(first), int(count)), tell=tell
        )
        if args.json:
            print(json.dumps(figures))
        else:
            print("{written} of {shards} shards scored, {records} records".format(**figures))

    return run


class Encoder:
    """The cosine of image and caption by a checkpoint of this package (InternVL-C or -G)."""

    def __init__(self, checkpoint: str, mode: str = "c"):
        import internvl_jax

        self._model, self._mode = internvl_jax.load(checkpoint), mode
        self.identity = f"{checkpoint} {mode}"

    def __call__(self, images: Sequence[Any], captions: Sequence[str]) -> np.ndarray:
        images = self._model.encode_image(images, mode=self._mode)
        texts = self._model.encode_text(list(captions))
        images, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return np.sum(images * texts, axis=-1)
