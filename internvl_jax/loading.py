"""`load`: a checkpoint of any kind as one object with host arrays in and out, for interactive use.

Training and evaluation on a mesh do not pass through here; they use `models` and `train`.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from internvl_jax import convert, models, quantising, serving
from internvl_jax.data import conversation, image, templates
from internvl_jax.data.chat_tokenizer import ChatTokenizer, holds_tokenizer
from internvl_jax.data.tokenizer import Detokenizer, Tokenizer
from internvl_jax.decoding import Decoding, Generated
from internvl_jax.evals import captioning, chat
from internvl_jax.evals.features import in_batches
from internvl_jax.kernels import Causal, Keys
from internvl_jax.models import ChatConfig, InternVLConfig, ModelConfig, bind, from_dict, int8
from internvl_jax.rules import flatten
from internvl_jax.sharding import ambient_mesh, check_divisible, replicate
from internvl_jax.train import pretrained, streaming

_ASSETS = Path(__file__).parent / "assets" / "demo"
# InternVL-G and the chat model that the embedded job trains, as they ship with the package.
SHIPPED = {"demo": _ASSETS / "internvl", "demo-chat": _ASSETS / "chat"}
TEXT_LENGTH = 80  # the released code's limit for captions
_LARGEST_BATCH = 64
_GREEDY = serving.Sampling()


class LoadError(ValueError):
    """There is no checkpoint to load, or it cannot do what is asked of it."""


@functools.partial(jax.jit, static_argnames=("config", "mode"))
def _encode_image(params: dict, pixels: jax.Array, *, config: Any, mode: str) -> jax.Array:
    features = bind(config, params).encode_image(pixels, mode=mode)
    return replicate(features.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("config",))
def _image_states(params: dict, pixels: jax.Array, *, config: Any) -> jax.Array:
    _, states = bind(config, params).vit(pixels, hidden_states=True)
    return replicate(jnp.swapaxes(states.astype(jnp.float32), 0, 1))


@functools.partial(jax.jit, static_argnames=("config",))
def _text_states(params: dict, ids: jax.Array, *, config: Any) -> jax.Array:
    llama = bind(config, params).llama
    mask = Causal() & Keys(ids > 0)
    _, states = llama(llama.embed_tokens(ids), mask=mask, hidden_states=True)
    return replicate(jnp.swapaxes(states.astype(jnp.float32), 0, 1))


@functools.partial(jax.jit, static_argnames=("config",))
def _encode_text(params: dict, ids: jax.Array, *, config: Any) -> jax.Array:
    return replicate(bind(config, params).encode_text(ids).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint. Every method takes and returns host values, in any batch size.

    config: shapes of the model. params: nested dict of arrays, as `models.bind` takes them.
    tokenizer: the checkpoint's own, or None. experiment: the config of the run that made the
      checkpoint, {} for one in an official layout. mesh: over which the parameters lie, or None.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | ChatTokenizer | None
    experiment: Mapping[str, Any]
    mesh: Mesh | None = None

    def encode_image(self, pixels: Any, mode: str = "c") -> np.ndarray:
        """Image features float32 [N, E] of InternVL-C ("c") or InternVL-G ("g").

        pixels: uint8 [N, H, W, 3], or a sequence of Pillow images or arrays of any size; or floats
          [N, H, W, 3] that are normalised already, which are taken as they are.
        Not normalised, as in the release; `similarity` does that. LoadError for mode "g" of an
        InternVL-C, ValueError for another mode.
        """
        config = self._internvl("encode_image")
        if mode == "g" and not config.num_queries:
            raise LoadError("mode 'g' needs the middleware, which this InternVL-C does not have")
        step = functools.partial(_encode_image, self.params, config=config, mode=mode)
        return self._batched(step, _pixels(pixels, config.vit.image_size))

    def image_states(self, pixels: Any) -> np.ndarray:
        """The vision tower's residual stream float32 [depth + 1, N, 1 + patches, D].

        The first entry is the embedding, each other one follows a block; the class token comes
        first. pixels: as for `encode_image`.
        """
        if not hasattr(self.config, "vit"):
            raise LoadError(f"{_kind(self.config)} has no vision tower")
        step = functools.partial(_image_states, self.params, config=self.config)
        pixels = _pixels(pixels, getattr(self.config, "input_size", self.config.vit.image_size))
        return np.swapaxes(self._batched(step, pixels), 0, 1)

    def text_states(self, texts: np.ndarray | Sequence[str] | str) -> np.ndarray:
        """The text tower's hidden states float32 [depth + 1, N, T, W] of texts without an image.

        The embedding, then each block's output, the last after the final norm. texts: as for
        `encode_text`; states at padding mean nothing.
        """
        config = self._internvl("text_states")
        ids = self._ids([texts] if isinstance(texts, str) else texts)
        step = functools.partial(_text_states, self.params, config=config)
        return np.swapaxes(self._batched(step, ids), 0, 1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        images: Any = None,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Generated:
        """Continue prompts of token ids, of any lengths together; `settings` are of `Decoding`.

        images: one per prompt for InternVL-G, one or an array of several for a chat model, in the
          forms that `encode_image` takes; none for a language model. The stop ids are the
          tokenizer's end token unless given. Returns numpy arrays.
        """
        if "stop_ids" not in settings and self.tokenizer is not None:
            settings["stop_ids"] = (self.tokenizer.eos_id,)
        if images is not None:
            size = getattr(self.config, "input_size", None) or self.config.vit.image_size
            images = [_pixels(_group(group), size) for group in images]
            if isinstance(self.config, InternVLConfig):
                images = np.concatenate(images)
        with ambient_mesh(self.mesh):
            decoding = Decoding(**settings)
            return serving.continue_prompts(
                self.config, self.params, prompts, decoding, images=images, seed=seed
            )

    def encode_text(self, texts: np.ndarray | Sequence[str] | str) -> np.ndarray:
        """Text features float32 [N, E], not normalised.

        texts: strings, which get the prefix "summarize:" of training and its cleaning (lower case,
          50 words); or int32 ids [N, T] right-padded with 0, which are taken as they are.
        """
        config = self._internvl("encode_text")
        ids = self._ids([texts] if isinstance(texts, str) else texts)
        return self._batched(functools.partial(_encode_text, self.params, config=config), ids)

    def similarity(self, image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
        """Cosine times the learnt scale: logits float32 [I, T]; softmax over T classifies."""
        self._internvl("similarity")
        scale = np.exp(np.asarray(self.params["logit_scale"], np.float32))
        images, texts = (np.asarray(x, np.float32) for x in (image_features, text_features))
        images, texts = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
        return scale * (images @ texts.T)

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
        with ambient_mesh(self.mesh):
            return captioning.write_captions(
                config, self.params, images, language, self.tokenizer, decoding, _size(len(images))
            )

    def chat(
        self, picture: Any, question: str, *, num_beams: int = 1, max_new_tokens: int = 40
    ) -> str:
        """The answer to a question about one image (Pillow image or uint8 [H, W, 3])."""
        template = self.chat_template
        with ambient_mesh(self.mesh):
            (answer,) = chat.write_answers(
                self.config,
                self.params,
                _pixels([picture], self.config.input_size),
                [question],
                self._tokenizer(),
                template,
                self._decoding(num_beams, max_new_tokens),
                batch_size=1,
            )
        return answer

    def chat_prompt(self, rounds: Sequence[tuple[str, str | None]]) -> list[int]:
        """Ids of a conversation of (question, answer) with "<image>" marks; the last answer None.

        Raises LoadError where `chat` does.
        """
        template = self.chat_template
        return conversation.encode_chat(
            self._tokenizer(), template, rounds, self.config.tokens_per_image
        )[0]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Sequence[Any]],
        sampling: Sequence[serving.Sampling],
        max_new_tokens: int,
    ) -> Iterator[np.ndarray]:
        """The next id of each chat prompt, int32 [N], step by step; see `serving.stream`.

        images: for each prompt a list of its images, which may be empty.
        """
        size = self.config.input_size
        blank = np.zeros((1, size, size, 3), np.uint8)  # no image position takes its features
        pixels = [_pixels(group, size) if len(group) else blank for group in images]
        steps = serving.stream(
            self.config, self.params, prompts, sampling, max_new_tokens, images=pixels
        )
        while True:
            with ambient_mesh(self.mesh):  # left before the reader's own code runs
                tokens = next(steps, None)
            if tokens is None:
                return
            yield tokens

    def reply(
        self,
        rounds: Sequence[tuple[str, str | None]],
        images: Sequence[Any],
        *,
        max_new_tokens: int = 256,
        sampling: serving.Sampling = _GREEDY,
    ) -> Iterator[str]:
        """The answer to the last of several questions, piece by piece as it is written.

        rounds, images: as for `chat_prompt` and, of one prompt, `stream`.
        """
        prompt = self.chat_prompt(rounds)
        text = Detokenizer(self._tokenizer())
        for (token,) in self.stream([prompt], [images], [sampling], max_new_tokens):
            if token == self._tokenizer().eos_id:
                break
            yield text.push(token)
        yield text.end()

    @property
    def chat_template(self) -> str:
        """Name of the chat template of this checkpoint, from its run or its config.json.

        Raises LoadError for what is no chat model.
        """
        if not isinstance(self.config, ChatConfig):
            raise LoadError(
                f"chat needs a chat checkpoint, not {_kind(self.config)}; "
                'load the work directory of stage 3, or "demo-chat"'
            )
        template = self.experiment.get("data", {}).get("template", self.config.template)
        return "brief" if template == "plain" else template

    def _batched(self, step: Any, rows: np.ndarray) -> np.ndarray:
        with ambient_mesh(self.mesh):
            return in_batches(step, (rows,), _size(len(rows)))

    def _internvl(self, what: str) -> InternVLConfig:
        if not isinstance(self.config, InternVLConfig):
            raise LoadError(f"{what} needs an InternVL-C or -G, not {_kind(self.config)}")
        return self.config

    def _tokenizer(self) -> Tokenizer | ChatTokenizer:
        if self.tokenizer is None:
            raise LoadError(
                "the checkpoint came without its tokenizer.model (of newer chat models "
                "tokenizer.json, or vocab.json and merges.txt); put it beside the weights, or pass "
                "token ids"
            )
        return self.tokenizer

    def _decoding(self, num_beams: int, max_new_tokens: int) -> Decoding:
        stop = (self._tokenizer().eos_id,)
        return Decoding(max_new_tokens=max_new_tokens, num_beams=num_beams, stop_ids=stop)

    @property
    def text_length(self) -> int:
        """Tokens to which the text tower's inputs are cut."""
        return self.experiment.get("data", {}).get("text_length", TEXT_LENGTH)

    def text_ids(self, texts: Sequence[str]) -> np.ndarray:
        """The text tower's inputs int32 [N, `text_length`], right-padded with 0."""
        wrapped = [conversation.contrastive_text(text) for text in texts]
        return self._tokenizer().encode_batch(wrapped, self.text_length)

    def _ids(self, texts: np.ndarray | Sequence[str]) -> np.ndarray:
        if not isinstance(texts, Sequence):
            return np.asarray(texts, np.int32)
        ids = self.text_ids(texts)
        # Padding changes no result; rounding it up keeps the number of compiled programs small.
        used = int((ids > 0).sum(axis=1).max(initial=1))
        return ids[:, : -(-used // 16) * 16]


def load(
    source: str | os.PathLike,
    dtype: Any = None,
    mesh: Mesh | None = None,
    weights: str | None = None,
) -> Model:
    """Load a checkpoint.

    Args:
        source: "demo" (InternVL-G of the embedded job) or "demo-chat", which ship with the
            package; a work directory of `train`, or one step in it; a file or folder of weights in
            an official PyTorch layout that `convert` knows.
        dtype: of the parameters, cast one by one as they are read; None keeps what is stored,
            float32 for the shipped ones.
        mesh: over which to shard the parameters (`sharding.make_mesh`); each device reads its part
            only. None: everything lies on the first device.
        weights: "int8" holds matrices as whole numbers with a scale per output channel
            (`models.int8`), made as they are read; adapters are folded in. For inference alone.
            `dtype` is then that of the rest.

    Raises:
        LoadError: nothing is there, or no such kind of weights. CheckpointError, FileError,
        MappingError: what is there is damaged or not what it seems. MeshError: the model does not
        divide over the mesh.
    """
    if weights is not None and weights not in int8.KINDS:
        known = ", ".join(int8.KINDS)
        raise LoadError(f"weights {weights!r}: there are {known}, or None for floating point")
    shipped = SHIPPED.get(str(source))
    path = shipped or Path(source)
    if not path.exists():
        raise LoadError(
            f"there is no checkpoint at {path}; give a work directory, a folder of official "
            f"weights, or one of {', '.join(SHIPPED)}"
        )
    dtype = jnp.dtype(dtype or "float32") if dtype or shipped else None
    official = convert.holds_weights(path)
    if official:
        config, experiment = convert.open_torch_layout(path).config, {}
    else:
        experiment = pretrained.read_experiment(path)
        if not {"family", "class"} & set(experiment["model"]):
            raise LoadError(f"{path} does not name its model; use it through init_from of a config")
        config = from_dict(experiment["model"])
    if mesh is not None:
        check_divisible(config, mesh)
    with ambient_mesh(mesh):
        if weights is not None:
            config, params = _quantised(path, config, dtype)
        elif official:
            config, params = convert.load_torch_layout(path, dtype)
        else:
            shardings = None if mesh is None else flatten(models.shardings(config, mesh))
            params, _ = pretrained.read_params(path, shardings, dtype)
    if source == "demo-chat":  # stage 3 leaves the tower as it is, so it ships once
        params["vit"] = load("demo", dtype, mesh, weights).params["vit"]
    tokenizer = _tokenizer_beside(path, config)
    recorded = experiment.get("data", {}).get("tokenizer")
    if recorded is not None and not (path / "tokenizer.model").is_file():
        tokenizer = Tokenizer(recorded or None)
    return Model(config, params, tokenizer, experiment, mesh)


def _quantised(path: Path, config: ModelConfig, dtype: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """(configuration without adapters, parameters) of a checkpoint of any kind, in int8."""
    config = dataclasses.replace(config, lora=None)
    if convert.holds_weights(path):
        parameters = convert.open_torch_layout(path).leaves
    else:
        parameters, _ = streaming.open_params(path)
    return config, quantising.read(parameters, flatten(models.abstract(config)), dtype)


def _tokenizer_beside(path: Path, config: ModelConfig) -> Tokenizer | ChatTokenizer | None:
    """The tokenizer next to official weights; else this package's, if the sizes agree."""
    folder = path if path.is_dir() else path.parent
    layout = templates.TEMPLATES.get(getattr(config, "template", "plain"))
    if layout is not None and layout.end.strip() != "</s>":  # special tokens around turns
        return ChatTokenizer(folder, layout) if holds_tokenizer(folder) else None
    beside = folder / "tokenizer.model"
    if beside.is_file():
        return Tokenizer(beside)
    own = Tokenizer()
    llama = getattr(config, "llama", None) or getattr(config, "llm", None)
    return own if llama is not None and llama.vocab_size == own.vocab_size else None


def _kind(config: ModelConfig) -> str:
    return f"a {type(config).__name__.removesuffix('Config')}"


def _group(picture: Any) -> Any:
    """The images of one prompt, given as one image or several."""
    if isinstance(picture, np.ndarray):
        return picture[None] if picture.ndim == 3 else picture
    return [picture] if isinstance(picture, Image.Image) else picture


def _pixels(pictures: Any, size: int) -> np.ndarray:
    """uint8 [N, size, size, 3] of an array of that form, or of pictures of any size.

    Floats [N, H, W, 3] count as normalised and stay.
    """
    if isinstance(pictures, np.ndarray) and np.issubdtype(pictures.dtype, np.floating):
        if pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise LoadError(f"normalised images are [N, H, W, 3], not {list(pictures.shape)}")
        return pictures.astype(np.float32)
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
