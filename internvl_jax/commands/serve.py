"""`internvl-jax serve`: an OpenAI-compatible HTTP server."""

import argparse
import time
from pathlib import Path

from internvl_jax.commands import CHECKPOINT_HELP, WEIGHTS, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """Serve checkpoints over HTTP as the OpenAI API has it: chat about images, embeddings."""
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        help=f"{CHECKPOINT_HELP} or \"demo-chat\"; may be repeated, NAME=PATH names a model",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address; default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0 for any; default: %(default)s")
    parser.add_argument("--dtype", help="of the parameters, as bfloat16; default: as stored")
    parser.add_argument("--weights", **WEIGHTS)
    parser.add_argument(
        "--skip_warm_up",
        action="store_true",
        help="answer at once, and compile a program when a request first needs it",
    )
    limit = {"type": int, "metavar": "N", "help": "default: %(default)s"}
    parser.add_argument("--max_upload_mb", default=10, **limit)
    parser.add_argument("--max_megapixels", default=25, **limit)
    parser.add_argument("--max_images", default=4, **limit)
    parser.add_argument("--max_prompt_tokens", default=4096, **limit)
    parser.add_argument("--max_new_tokens", default=512, **limit)
    parser.add_argument("--max_requests", default=64, **limit)
    parser.add_argument("--max_batch", default=8, **limit)

    def run(args: argparse.Namespace) -> None:
        try:
            import uvicorn
        except ImportError:
            raise ImportError("serve needs the extra: pip install 'internvl-jax[serve]'") from None
        from internvl_jax import loading
        from internvl_jax.models import ChatConfig
        from internvl_jax.server.app import Server
        from internvl_jax.server.requests import Limits

        wrong = [k for k, v in vars(args).items() if k.startswith("max_") and v < 1]
        if wrong:
            raise ValueError(f"--{wrong[0]} must be at least 1")
        limits = Limits(
            upload_bytes=args.max_upload_mb << 20,
            pixels=args.max_megapixels * 10**6,
            images=args.max_images,
            prompt_tokens=args.max_prompt_tokens,
            new_tokens=args.max_new_tokens,
            requests=args.max_requests,
            batch=args.max_batch,
        )
        named = dict(_named(given) for given in args.checkpoint)
        if len(named) < len(args.checkpoint):
            raise ValueError("two checkpoints have the same name; give them as NAME=PATH")
        models = {
            name: loading.load(path, args.dtype, weights=args.weights)
            for name, path in named.items()
        }
        for name, model in models.items():
            talks = isinstance(model.config, ChatConfig)
            what = f"chat, template {model.chat_template}" if talks else "embeddings"
            if talks:
                model.chat_prompt([("", None)])  # says at once what is missing for a conversation
            print(f"{name}: {what}", flush=True)
        server = Server(models, limits)
        if not args.skip_warm_up:
            began = time.monotonic()
            for number, what in enumerate(server.warm(), 1):
                print(f"{time.monotonic() - began:5.0f} s  program {number}: {what}", flush=True)
        print(f"serving {', '.join(models)}", flush=True)
        uvicorn.run(
            server.app,
            host=args.host,
            port=args.port,
            log_level="warning" if args.port else "info",
            timeout_keep_alive=5,
        )

    return run


def _named(given: str) -> tuple[str, str]:
    """(name, path) of "NAME=PATH" or of a path, whose last part names it."""
    name, equals, path = given.partition("=")
    return (name, path) if equals else (Path(given).name or given, given)
