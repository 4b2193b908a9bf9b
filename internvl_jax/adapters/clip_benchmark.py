"""CLIP_benchmark on our models.

    python -m internvl_jax.adapters.clip_benchmark eval --model_type internvl_jax \\
        --model internvl_g_retrieval --pretrained CHECKPOINT --dataset flickr30k …

`--model` is internvl_c or internvl_g, with _classification or _retrieval for how pictures are
resized; the rest is CLIP_benchmark's own command line.
"""

from typing import Any

from internvl_jax.adapters import open_clip
from internvl_jax.loading import LoadError

MODELS = {
    f"internvl_{mode}_{task}": (mode, task) for mode in "cg" for task in open_clip.TASKS
} | {f"internvl_{mode}": (mode, "retrieval") for mode in "cg"}


def load(model_name: str, pretrained: str, cache_dir: str | None = None, device: Any = "cpu"):
    """(model, transform, tokenizer), the contract of `clip_benchmark.models.load_clip`."""
    if model_name not in MODELS:
        raise LoadError(f"unknown model {model_name!r}; choose one of {', '.join(MODELS)}")
    model, preprocess, tokenizer = open_clip.create(pretrained, *MODELS[model_name])
    return model.to(device), preprocess, tokenizer


def register() -> None:
    """Make `--model_type internvl_jax` known to an installed CLIP_benchmark."""
    from clip_benchmark import models

    models.TYPE2FUNC["internvl_jax"] = load
    if "internvl_jax" not in models.MODEL_TYPES:
        models.MODEL_TYPES.append("internvl_jax")


def main() -> None:
    """CLIP_benchmark's command line, with our model type."""
    register()
    from clip_benchmark import cli

    cli.main()


if __name__ == "__main__":
    main()
