"""What adapters of chat benchmarks share: questions with pictures, answers, and likelihoods."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from internvl_jax import loading
from internvl_jax.data import conversation, image
from internvl_jax.models import ChatConfig, bind
from internvl_jax.sharding import replicate


@functools.partial(jax.jit, static_argnames=("config",))
def _log_probabilities(params, tokens, images, targets, *, config) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target [B, T] after its prefix, and whether it is the likeliest."""
    logits = bind(config, params)(tokens, images).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return replicate(chosen), replicate(jnp.argmax(logits, axis=-1) == targets)


class Chat:
    """A chat checkpoint that answers about pictures of any size, padded to squares."""

    def __init__(self, source: str):
        self.model = loading.load(source)
        if not isinstance(self.model.config, ChatConfig):
            raise loading.LoadError(f"{source} is not a chat checkpoint")
        if self.model.tokenizer is None:
            raise loading.LoadError(f"{source} came without its tokenizer.model")
        self.template = self.model.chat_template

    def _pixels(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        size = self.model.config.input_size
        rows = [image.square(image.pad_to_square(p.convert("RGB")), size) for p in pictures]
        # A question without a picture still runs through the same program; no position shows it.
        return np.stack(rows) if rows else np.zeros((1, size, size, 3), np.uint8)

    def _prompt(self, question: str, pictures: int) -> list[int]:
        marks = (conversation.IMAGE_MARK + "\n") * pictures
        text = marks + question.replace(conversation.IMAGE_MARK, "").strip()
        config, tokenizer = self.model.config, self.model.tokenizer
        return conversation.encode_chat(
            tokenizer, self.template, [(text, None)], config.tokens_per_image
        )[0]

    def answer(
        self, question: str, pictures: Sequence[Image.Image], max_new_tokens: int = 128,
        num_beams: int = 1, until: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """The greedy answer, cut before the first of `until`."""
        pixels = self._pixels(pictures)
        found = self.model.generate(
            [self._prompt(question, len(pictures))], [pixels],
            max_new_tokens=max_new_tokens, num_beams=num_beams,
        )  # fmt: skip
        text = self.model.tokenizer.decode(found.ids[0, 0]).strip()
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text.strip()

    def likelihood(
        self, question: str, answer: str, pictures: Sequence[Image.Image]
    ) -> tuple[float, bool]:
        """Log-probability of an answer after a question, and whether it is the greedy one."""
        prompt = self._prompt(question, len(pictures))
        new = self.model.tokenizer.encode(answer.strip(), bos=False)
        if not new:
            return 0.0, True
        length = -(-(len(prompt) + len(new)) // 64) * 64
        tokens, targets = np.zeros((2, 1, length), np.int32)
        row = [*prompt, *new]
        tokens[0, : len(row)] = row
        targets[0, len(prompt) - 1 : len(row) - 1] = new
        chosen, best = _log_probabilities(
            self.model.params, tokens, self._pixels(pictures)[None], targets,
            config=self.model.config,
        )  # fmt: skip
        where = slice(len(prompt) - 1, len(row) - 1)
        return float(np.sum(chosen[0, where])), bool(np.all(best[0, where]))


def as_picture(one: Any) -> Image.Image:
    """A Pillow image of one, or of a file's path."""
    return one if isinstance(one, Image.Image) else image.read(one)
