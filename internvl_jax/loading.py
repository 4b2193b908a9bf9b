"""`load`: a checkpoint of any kind as one object with host arrays in and out, for interactive use.

Training and evaluation on a mesh do not pass through here; they use `models` and `train`.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from internvl_jax import convert
from internvl_jax.data import conversation, image
from internvl_jax.data.tokenizer import Tokenizer
from internvl_jax.decoding import Decoding
from internvl_jax.evals import captioning, chat
from internvl_jax.evals.features import in_batches
from internvl_jax.models import ChatConfig, InternVLConfig, ModelConfig, bind, from_dict
from internvl_jax.sharding import replicate
from internvl_jax.train import pretrained

_ASSETS = Path(__file__).parent / "assets" / "demo"
# InternVL-G and the chat model that the embedded job trains, as they ship with the package.
SHIPPED = {"demo": _ASSETS / "internvl", "demo-chat": _ASSETS / "chat"}
TEXT_LENGTH = 80  # the released code's limit for captions
_LARGEST_BATCH = 64


class LoadError(ValueError):
    """There is no checkpoint to load, or it cannot do what is asked of it."""


@functools.partial(jax.jit, static_argnames=("config", "mode"))
def _encode_image(params: dict, pixels: jax.Array, *, config: Any, mode: str) -> jax.Array:
    features = bind(config, params).encode_image(pixels, mode=mode)
    return replicate(features.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("config",))
def _encode_text(params: dict, ids: jax.Array, *, config: Any) -> jax.Array:
    return replicate(bind(config, params).encode_text(ids).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint. Every method takes and returns host values, in any batch size.

    config: shapes of the model. params: nested dict of arrays, as `models.bind` takes them.
    tokenizer: the checkpoint's own, or None. experiment: the config of the run that made the
      checkpoint, {} for one in an official layout.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    experiment: Mapping[str, Any]

    def encode_image(self, pixels: Any, mode: str = "c") -> np.ndarray:
        """Image features float32 [N, E] of InternVL-C ("c") or InternVL-G ("g").

        pixels: uint8 [N, H, W, 3], or a sequence of Pillow images or arrays of any size.
        Not normalised, as in the release; `similarity` does that. LoadError for mode "g" of an
        InternVL-C, ValueError for another mode.
        """
        config = self._internvl("encode_image")
        if mode == "g" and not config.num_queries:
            raise LoadError("mode 'g' needs the middleware, which this InternVL-C does not have")
        step = functools.partial(_encode_image, self.params, config=config, mode=mode)
        return _batched(step, _pixels(pixels, config.vit.image_size))

    def encode_text(self, texts: np.ndarray | Sequence[str] | str) -> np.ndarray:
        """Text features float32 [N, E], not normalised.

        texts: strings, which get the prefix "summarize:" of training and its cleaning (lower case,
          50 words); or int32 ids [N, T] right-padded with 0, which are taken as they are.
        """
        config = self._internvl("encode_text")
        ids = self._ids([texts] if isinstance(texts, str) else texts)
        return _batched(functools.partial(_encode_text, self.params, config=config), ids)

    def similarity(self, image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
        """Cosine times the learnt scale: logits float32 [I, T]; softmax over T classifies."""
        model = bind(self._internvl("similarity"), self.params)
        return np.asarray(model.similarity(jnp.asarray(image_features), jnp.asarray(text_features)))

    def caption(
        self, pixels: Any, language: str = "en", *, num_beams: int = 5, max_new_tokens: int = 40
    ) -> list[str]:
        """One caption per image, written by the middleware after "<Language> caption:".

        pixels: as for `encode_image`. Raises LoadError for an InternVL-C, or another language than
        those of `conversation.GENERATION_PROMPTS`.
        """
        config = self._internvl("caption")
        if not config.num_queries:
            raise LoadError("captions need the middleware, which this InternVL-C does not have")
        if language not in conversation.GENERATION_PROMPTS:
            known = ", ".join(conversation.GENERATION_PROMPTS)
            raise LoadError(f"there is no caption prompt for language {language!r}; use {known}")
        images = _pixels(pixels, config.vit.image_size)
        decoding = self._decoding(num_beams, max_new_tokens)
        return captioning.write_captions(
            config, self.params, images, language, self.tokenizer, decoding, _size(len(images))
        )

    def chat(
        self, picture: Any, question: str, *, num_beams: int = 1, max_new_tokens: int = 40
    ) -> str:
        """The answer to a question about one image (Pillow image or uint8 [H, W, 3])."""
        if not isinstance(self.config, ChatConfig):
            raise LoadError(
                f"chat needs a chat checkpoint, not {_kind(self.config)}; "
                'load the work directory of stage 3, or "demo-chat"'
            )
        template = self.experiment.get("data", {}).get("template", "vicuna_v1")
        (answer,) = chat.write_answers(
            self.config,
            self.params,
            _pixels([picture], self.config.vit.image_size),
            [question],
            self._tokenizer(),
            "brief" if template == "plain" else template,
            self._decoding(num_beams, max_new_tokens),
            batch_size=1,
        )
        return answer

    def _internvl(self, what: str) -> InternVLConfig:
        if not isinstance(self.config, InternVLConfig):
            raise LoadError(f"{what} needs an InternVL-C or -G, not {_kind(self.config)}")
        return self.config

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise LoadError(
                "the checkpoint came without its tokenizer.model; put that file beside the "
                "weights, or pass token ids"
            )
        return self.tokenizer

    def _decoding(self, num_beams: int, max_new_tokens: int) -> Decoding:
        stop = (self._tokenizer().eos_id,)
        return Decoding(max_new_tokens=max_new_tokens, num_beams=num_beams, stop_ids=stop)

    def _ids(self, texts: np.ndarray | Sequence[str]) -> np.ndarray:
        if not isinstance(texts, Sequence):
            return np.asarray(texts, np.int32)
        tokenizer = self._tokenizer()
        length = self.experiment.get("data", {}).get("text_length", TEXT_LENGTH)
        ids = tokenizer.encode_batch([conversation.contrastive_text(t) for t in texts], length)
        # Padding changes no result; rounding it up keeps the number of compiled programs small.
        used = int((ids > 0).sum(axis=1).max(initial=1))
        return ids[:, : -(-used // 16) * 16]


def load(source: str | os.PathLike, dtype: Any = None) -> Model:
    """Load a checkpoint.

    Args:
        source: "demo" (InternVL-G of the embedded job) or "demo-chat", which ship with the
            package; a work directory of `train`, or one step in it; a file or folder of weights in
            an official PyTorch layout that `convert` knows.
        dtype: of the parameters; None keeps what is stored, float32 for the shipped ones.

    Raises:
        LoadError: nothing is there. CheckpointError, FileError, MappingError: what is there is
            damaged or not what it seems.
    """
    shipped = SHIPPED.get(str(source))
    path = shipped or Path(source)
    if not path.exists():
        raise LoadError(
            f"there is no checkpoint at {path}; give a work directory, a folder of official "
            f"weights, or one of {', '.join(SHIPPED)}"
        )
    if path.suffix == ".safetensors" or any(path.glob("*.safetensors")):
        config, params = convert.load_torch_layout(path)
        tokenizer, experiment = _tokenizer_beside(path, config), {}
    else:
        params, meta = pretrained.read_params(path)
        experiment = meta["config"]
        if "family" not in experiment["model"]:
            raise LoadError(f"{path} does not name its model; use it through init_from of a config")
        config = from_dict(experiment["model"])
        tokenizer = Tokenizer(experiment["data"].get("tokenizer") or None)
    dtype = jnp.dtype(dtype or "float32") if dtype or shipped else None
    if dtype is not None:
        params = jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
        )
    return Model(config, params, tokenizer, experiment)


def _tokenizer_beside(path: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer.model next to official weights; else this package's, if the sizes agree."""
    beside = (path if path.is_dir() else path.parent) / "tokenizer.model"
    if beside.is_file():
        return Tokenizer(beside)
    own = Tokenizer()
    llama = getattr(config, "llama", None) or getattr(config, "llm", None)
    return own if llama is not None and llama.vocab_size == own.vocab_size else None


def _kind(config: ModelConfig) -> str:
    return f"a {type(config).__name__.removesuffix('Config')}"


def _pixels(pictures: Any, size: int) -> np.ndarray:
    """uint8 [N, size, size, 3] of an array of that form, or of pictures of any size."""
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        raise LoadError(f"images are uint8 [N, H, W, 3] or a sequence, not {pictures.shape}")
    rows = []
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            picture = np.asarray(picture)
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                raise LoadError(
                    f"an image is uint8 [H, W, 3], not {picture.dtype} {list(picture.shape)}"
                )
            if picture.shape[:2] == (size, size):
                rows.append(picture)
                continue
            picture = Image.fromarray(picture)
        rows.append(image.square(picture.convert("RGB"), size))
    return np.stack(rows) if rows else np.zeros((0, size, size, 3), np.uint8)


def _size(rows: int) -> int:
    """Batch size for so many rows: few sizes, so few compiled programs."""
    return min(_LARGEST_BATCH, 1 << max(rows - 1, 0).bit_length())


def _batched(step: Any, rows: np.ndarray) -> np.ndarray:
    return in_batches(step, (rows,), _size(len(rows)))
