"""Continuous batching: chats that go on side by side, each joining when it comes.

One cache holds a fixed number of rows. A prompt is read alone and its keys and values are laid into
a free row so that they end where the others stand; from then on every step gives each row its next
token. All rows write the same slot, which goes round: rotary positions are in the keys already, so
the order of slots means nothing, and a row never lives long enough to meet its own beginning.

A server thus has few programs: one to join per length of prompts and number of images, and one for
the step. All can be compiled before the first request comes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from internvl_jax.models import ChatConfig, bind
from internvl_jax.models.llama import Cache
from internvl_jax.serving import SHORTEST, Sampling, choose


def _power(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


class Slots:
    """Rows of a chat model on one device.

    rows: continued side by side. prompt_tokens, new_tokens: the most that a row may have; images:
    of a prompt. `params` are those of the model, which a mesh must not divide.
    """

    def __init__(
        self,
        config: ChatConfig,
        params: Any,
        *,
        rows: int,
        prompt_tokens: int,
        new_tokens: int,
        images: int,
    ):
        self.rows = rows
        self._config, self._params, self._most_images = config, params, images
        self._longest = max(_power(prompt_tokens), SHORTEST)
        self._room = self._longest + new_tokens
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        llm, rows = self._config.llm, self.rows
        shape = (llm.depth, rows, self._room, llm.num_kv_heads, llm.head_dim)
        cache = Cache(
            keys=jnp.zeros(shape, llm.dtype),
            values=jnp.zeros(shape, llm.dtype),
            visible=jnp.zeros((rows, self._room), bool),
            positions=jnp.zeros(rows, jnp.int32),
            length=jnp.int32(0),
        )
        # Tied to the parameters' device as the programs' results are: for arrays that could lie
        # anywhere every program would be compiled a second time.
        (device,) = jax.tree.leaves(self._params)[0].devices()
        self._token, self._cache = jax.device_put((jnp.zeros(rows, jnp.int32), cache), device)
        self._steps = np.zeros(rows, np.int32)
        self._temperature = np.zeros(rows, np.float32)
        self._top_p = np.ones(rows, np.float32)
        self._seeds = np.zeros(rows, np.uint32)

    def join(
        self, row: int, prompt: Sequence[int], images: Sequence[np.ndarray], sampling: Sampling
    ) -> None:
        """Read a prompt into a row, whatever was there; its first token comes with the next step.

        images: uint8 [H, H, 3] of the model's size, one per image of the prompt; may be empty.
        """
        size = self._config.input_size
        length = min(max(_power(len(prompt)), SHORTEST), self._longest)
        ids, valid = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        ids[0, length - len(prompt) :], valid[0, length - len(prompt) :] = prompt, True
        pixels = np.zeros((1, _power(len(images)), size, size, 3), np.uint8)
        for n, image in enumerate(images):  # features beyond the prompt's positions are not placed
            pixels[0, n] = image
        self._temperature[row], self._top_p[row] = sampling.temperature, sampling.top_p
        self._seeds[row], self._steps[row] = sampling.seed & 0xFFFFFFFF, 1
        own = (a[row : row + 1].copy() for a in (self._temperature, self._top_p, self._seeds))
        self._token, self._cache = _join(
            self._params, ids, valid, pixels, self._token, self._cache, np.int32(row), *own,
            config=self._config,
        )  # fmt: skip

    def step(self) -> np.ndarray:
        """The next id of every row, int32 [rows]; those of rows that nobody joined mean nothing."""
        # The device chooses the tokens after these while the caller looks at them.
        now = self._token
        settings = (self._steps, self._temperature, self._top_p, self._seeds)
        self._token, self._cache = _step(
            self._params, now, self._cache, *(a.copy() for a in settings), config=self._config
        )
        self._steps += 1
        return np.asarray(now)

    def warm(self) -> Iterator[str]:
        """Run every program once, so that none compiles later; yields what it was."""
        each = self._config.tokens_per_image
        blank = np.zeros((self._config.input_size, self._config.input_size, 3), np.uint8)
        lengths = [SHORTEST << n for n in range((self._longest // SHORTEST).bit_length())]
        counts = [1 << n for n in range(_power(self._most_images).bit_length())]
        for length in lengths:
            for count in counts:
                fewest = count // 2 + 1 if count > 1 else 0
                if fewest * each < length:
                    self.join(0, [1] * length, [blank] * count, Sampling())
                    self.step()
                    yield f"chat, prompts of {length} tokens with {count} image(s)"
        self.clear()


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _join(params, ids, valid, images, token, cache, row, temperature, top_p, seed, *, config):
    """Tokens of all rows and the cache, with a prompt [1, P] in place of row `row`."""
    length, room = ids.shape[1], cache.visible.shape[1]
    logits, read = bind(config, params).prefill(ids, images, length + 1, valid=valid)
    first = choose(logits, jnp.zeros(1, jnp.int32), temperature, top_p, seed)
    where = (cache.length - length + jnp.arange(length)) % room
    return token.at[row].set(first[0]), dataclasses.replace(
        cache,
        keys=cache.keys.at[:, row, where].set(read.keys[:, 0, :length]),
        values=cache.values.at[:, row, where].set(read.values[:, 0, :length]),
        visible=cache.visible.at[row].set(False).at[row, where].set(read.visible[0, :length]),
        positions=cache.positions.at[row].set(read.positions[0]),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _step(params, token, cache, steps, temperature, top_p, seeds, *, config):
    logits, cache = bind(config, params).decode(token, cache)
    length = cache.length % cache.visible.shape[1]
    following = choose(logits, steps, temperature, top_p, seeds)
    return following, dataclasses.replace(cache, length=length)
