"""`model, preprocess, tokenizer` as open_clip gives them, for scripts written for that.

    from internvl_jax.adapters import open_clip
    model, preprocess, tokenizer = open_clip.create("checkpoints/internvl_14b_224px", mode="g")
    features = model.encode_image(preprocess(picture)[None])      # torch tensors in and out

The model computes in JAX; there are no gradients through it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from internvl_jax import loading
from internvl_jax.data import conversation, image

TASKS = {"retrieval": image.square, "classification": image.center_crop}


class Encoder(torch.nn.Module):
    """The two encoders of a loaded model. Tensors come back on the CPU, or where `to` said."""

    def __init__(self, model: loading.Model, mode: str):
        super().__init__()
        self.inner, self.mode = model, mode
        # What `to` moves: it holds the device for the results.
        self.register_buffer("logit_scale", torch.tensor(float(model.params["logit_scale"])))

    def encode_image(self, pixels: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """[N, 3, H, W], normalised as `preprocess` does → features [N, E]."""
        rows = pixels.detach().cpu().float().permute(0, 2, 3, 1).numpy()
        return self._result(self.inner.encode_image(rows, self.mode), normalize)

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Token ids [N, L], right-padded with 0, → features [N, E]."""
        rows = ids.detach().cpu().numpy().astype(np.int32)
        return self._result(self.inner.encode_text(rows), normalize)

    def _result(self, features: np.ndarray, normalize: bool) -> torch.Tensor:
        result = torch.from_numpy(np.array(features)).to(self.logit_scale.device)
        return torch.nn.functional.normalize(result, dim=-1) if normalize else result


def create(
    source: str, mode: str = "c", task: str = "retrieval"
) -> tuple[Encoder, Callable[[Image.Image], torch.Tensor], Callable[..., torch.Tensor]]:
    """Load a checkpoint (`internvl_jax.load`) as model, preprocess and tokenizer.

    mode: "c" or "g". task: "retrieval" (pictures are resized to a square) or "classification"
    (short side, then the centre), as the released evaluation has it. The tokenizer puts
    "summarize:" before every text.

    Raises LoadError: no such checkpoint, mode or task.
    """
    if task not in TASKS:
        raise loading.LoadError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if mode not in ("c", "g"):
        raise loading.LoadError(f"unknown mode {mode!r}; choose c or g")
    model = loading.load(source)
    size = model.config.vit.image_size
    length = model.experiment.get("data", {}).get("text_length", loading.TEXT_LENGTH)
    if model.tokenizer is None:
        raise loading.LoadError(f"{source} came without its tokenizer.model")

    def preprocess(picture: Image.Image) -> torch.Tensor:
        pixels = image.normalise(TASKS[task](picture.convert("RGB"), size))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def tokenizer(texts: str | Sequence[str], **_: Any) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        prefixed = [conversation.SUMMARIZE + text for text in texts]
        ids = model.tokenizer.encode_batch(prefixed, length)
        return torch.from_numpy(ids.astype(np.int64))

    return Encoder(model, mode), preprocess, tokenizer
