"""Turn a finished main job into the checkpoints that ship with the package.

    python scripts/make_demo_asset.py --workdir=runs/demo

Writes, as training saves them, internvl_jax/assets/demo/internvl (InternVL-G) and, if both fit,
internvl_jax/assets/demo/chat (the chat model without its vision tower, which is InternVL-G's).
Parameters are float32 where that stays within the limit, else bfloat16.
"""

import argparse
import itertools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax import loading
from internvl_jax.demo import job
from internvl_jax.models import ChatConfig, InternVLConfig, from_dict
from internvl_jax.train import pretrained

ASSETS = Path(loading.__file__).parent / "assets" / "demo"


def make(workdir: Path, target: Path, limit_mb: float = 10.0) -> str:
    """Write the checkpoints below `target`, replacing what is there; returns what was written.

    Raises ValueError if not even InternVL-G fits into the limit, or the vision towers differ.
    """
    internvl, chat = (_last(workdir, kind) for kind in (InternVLConfig, ChatConfig))
    same = jax.tree.map(np.array_equal, internvl.params["vit"], chat.params.pop("vit"))
    if not all(jax.tree.leaves(same)):
        raise ValueError("the chat model has another vision tower; its stages must freeze it")
    for both, dtype in itertools.product((True, False), ("float32", "bfloat16")):
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        _write(target / "internvl", internvl, jnp.dtype(dtype))
        if both:
            _write(target / "chat", chat, jnp.dtype(dtype))
        written = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
        if written <= limit_mb:
            break
    else:
        raise ValueError(
            f"InternVL-G takes {written:.1f} MB in {dtype}, more than {limit_mb} MB; "
            "train a smaller one"
        )
    names = "InternVL-G and the chat model" if both else "InternVL-G (no room for the chat model)"
    return f"{names} in {dtype}: {written:.1f} MB in {target}"


def _write(directory: Path, model: loading.Model, dtype: jnp.dtype) -> None:
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    # Where it was trained from is nobody's business but this machine's.
    pretrained.save_params(directory, params, config={**model.experiment, "init_from": []})
    # Orbax writes the path into these markers; what counts is that they are there.
    for marker in directory.rglob("commit_success.txt"):
        marker.write_text("complete\n")


def _last(workdir: Path, kind: type) -> loading.Model:
    stages = [s for s, c in job.shipped_configs().items() if isinstance(from_dict(c.model), kind)]
    return loading.load(workdir / stages[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path(job.CONFIG_WORKDIR))
    parser.add_argument("--output", type=Path, default=ASSETS)
    parser.add_argument("--limit-mb", type=float, default=10.0)
    options = parser.parse_args()
    print(make(options.workdir, options.output, options.limit_mb))
