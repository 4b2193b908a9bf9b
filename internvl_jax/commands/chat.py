"""`internvl-jax chat`: a conversation in the terminal, pictures by their paths."""

import argparse
import shlex
from pathlib import Path

from internvl_jax.commands import CHECKPOINT_HELP, WEIGHTS, Run

HELP = "/image PATH adds a picture to the next question, /reset starts over, /exit leaves"


def build(parser: argparse.ArgumentParser) -> Run:
    """Talk with a chat model about pictures, in several turns."""
    what = CHECKPOINT_HELP.replace("demo", "demo-chat")
    parser.add_argument("--checkpoint", required=True, help=what)
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words")
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")

    def run(args: argparse.Namespace) -> None:
        from internvl_jax import loading
        from internvl_jax.data import image

        if args.max_new_tokens < 1 or not 0 <= args.temperature < 100:
            raise ValueError("--max_new_tokens is at least 1 and --temperature at least 0")
        waiting = [image.read(path) for path in args.image]
        model = loading.load(args.checkpoint, weights=args.weights)
        model.chat_prompt([("", None)])  # says at once what is no chat model
        print(HELP)
        _converse(model, waiting, args)

    return run


def _converse(model, waiting, args) -> None:
    """Reads questions until the input ends or /exit; pictures in `waiting` go with the first."""
    from internvl_jax.data import conversation, image
    from internvl_jax.serving import Sampling

    sampling = Sampling(args.temperature, seed=args.seed)
    rounds, pictures = [], []
    while True:
        try:
            words = input("> ").strip()
        except EOFError:
            print()
            return
        command, _, rest = words.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            rounds, pictures, waiting = [], [], []
        elif command == "/image":
            try:
                waiting += [image.read(Path(p).expanduser()) for p in shlex.split(rest)]
            except (OSError, ValueError) as error:  # a wrong path does not end the conversation
                print(f"error: {error}")
        elif command.startswith("/"):
            print(HELP)
        elif words:
            marks = f"{conversation.IMAGE_MARK}\n" * len(waiting)
            pictures, waiting = pictures + waiting, []
            question = marks + words.replace(conversation.IMAGE_MARK, "")
            answer = ""
            for piece in model.reply(
                [*rounds, (question, None)],
                pictures,
                max_new_tokens=args.max_new_tokens,
                sampling=sampling,
            ):
                print(piece, end="", flush=True)
                answer += piece
            print()
            rounds.append((question, answer))
