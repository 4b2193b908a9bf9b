"""`internvl-jax web`: a page for the browser."""

import argparse
import signal
import socket
import sys
from pathlib import Path

from internvl_jax.commands import CHECKPOINT_HELP, Run


def build(parser: argparse.ArgumentParser) -> Run:
    """A web page: zero-shot, retrieval, captions, chat and attention maps."""
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        help=f'{CHECKPOINT_HELP}; twice for an InternVL and a chat model; "demo" brings both',
    )
    parser.add_argument("--gallery", help="folder of pictures to search; default: embedded scenes")
    parser.add_argument("--host", default="127.0.0.1", help="address; default: %(default)s")
    parser.add_argument("--port", type=int, default=7860, help="0 for any; default: %(default)s")
    parser.add_argument("--dtype", help="of the parameters, as bfloat16; default: as stored")
    limit = {"type": int, "metavar": "N", "help": "default: %(default)s"}
    parser.add_argument("--max_upload_mb", default=10, **limit)
    parser.add_argument("--max_megapixels", default=25, **limit)
    parser.add_argument("--max_images", default=4, **limit)
    parser.add_argument("--max_new_tokens", default=256, **limit)

    def run(args: argparse.Namespace) -> None:
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise ImportError("web needs the extra: pip install 'internvl-jax[demo]'") from None
        import uvicorn

        from internvl_jax import loading
        from internvl_jax.server.requests import Limits
        from internvl_jax.web import app, page
        from internvl_jax.web.site import Site

        if args.gallery is not None and not Path(args.gallery).is_dir():
            raise ValueError(f"--gallery: there is no folder at {args.gallery}")
        wrong = [k for k, v in vars(args).items() if k.startswith("max_") and v < 1]
        if wrong:
            raise ValueError(f"--{wrong[0]} must be at least 1")
        limits = Limits(
            upload_bytes=args.max_upload_mb << 20,
            pixels=args.max_megapixels * 10**6,
            images=args.max_images,
            new_tokens=args.max_new_tokens,
        )
        paths = args.checkpoint if args.checkpoint != ["demo"] else ["demo", "demo-chat"]
        # Uvicorn passes the signal on when it has stopped; uploads are deleted on the way out.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        listening = socket.create_server((args.host, args.port))
        with app.private_folder() as folder:
            models = {path: loading.load(path, args.dtype) for path in paths}
            tabs, offered = page.warmed(Site.of(models, limits, args.gallery), folder)
            config = uvicorn.Config(app.create(tabs, offered, limits), log_level="warning")
            print(f"open http://{args.host}:{listening.getsockname()[1]}", flush=True)
            uvicorn.Server(config).run([listening])

    return run
