"""`internvl-jax generate`: a caption of an image, or an answer about it."""

import argparse

from internvl_jax.commands import CHECKPOINT_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Describe an image, or answer a question about it."""
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument("--image", required=True, help="an image file")
    parser.add_argument("--question", help="ask this of a chat model instead of a caption")
    parser.add_argument("--language", default="en", help="of the caption; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import loading
        from internvl_jax.data import image

        picture = image.read(args.image)
        model = loading.load(args.checkpoint, weights=args.weights)
        if args.question:
            print(model.chat(picture, args.question))
        else:
            print(*model.caption([picture], args.language))

    return run
