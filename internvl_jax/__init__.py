"""InternVL in JAX: training, evaluation and conversion of the InternVL family on TPU meshes.

    model = internvl_jax.load("demo")                    # or a work directory, or official weights
    images = model.encode_image(pixels, mode="g")        # [N, E] numpy
    texts = model.encode_text(["a red star", "una estrella roja"])
    model.similarity(images, texts)                      # [N, 2] logits
    model.caption(pixels, language="ko")

The names below are imported when they are first used, so `import internvl_jax` costs nothing.
"""

import importlib
from typing import Any

_HOME = {
    "load": "loading",
    "Model": "loading",
    "evaluate": "evals.evaluate",
    "export": "convert",
    "InternVLConfig": "models",
    "ChatConfig": "models",
    "create": "models",
    "bind": "models",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        known = ", ".join(__all__)
        raise AttributeError(f"module 'internvl_jax' has no attribute {name!r}; it has {known}")
    return getattr(importlib.import_module(f"internvl_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
