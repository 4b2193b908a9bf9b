"""Continuous batching: a chat's words do not depend on when it joins or beside whom."""

import jax
import numpy as np
import pytest

from internvl_jax.models import create, from_dict
from internvl_jax.serving import Sampling, stream
from internvl_jax.slots import Slots

NEW = 12
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    config = from_dict({"family": "chat", "size": "tiny"})
    return config, create(config, jax.random.key(0))


@pytest.fixture(scope="module")
def slots(model):
    return Slots(*model, rows=3, prompt_tokens=64, new_tokens=NEW, images=2)


def asked(config, number):
    """(prompt, images, sampling) of the chat of this number; lengths, images and settings vary."""
    pictures = number % 3
    prompt = [1, *[-200] * (pictures * config.tokens_per_image), 5 + number, 9, *[7] * (number % 5)]
    sampling = Sampling(1.5, 0.9, number) if number % 2 else Sampling()
    return prompt, list(PIXELS[:pictures]), sampling


def alone(model, prompt, images, sampling):
    pixels = np.stack(images) if images else np.zeros((1, 32, 32, 3), np.uint8)
    steps = stream(*model, [prompt], [sampling], NEW, images=[pixels])
    return [int(token) for (token,) in steps]


def test_chats_that_come_and_go_are_as_if_alone(model, slots):
    config = model[0]
    waiting = [(n, asked(config, n)) for n in range(10)]
    expected = {n: alone(model, *chat) for n, chat in waiting}
    rows, found, most = [None] * slots.rows, {}, 0
    while waiting or any(row is not None for row in rows):
        # One joins per step, so that all of them stand at different places.
        if waiting and None in rows:
            number, (prompt, images, sampling) = waiting.pop(0)
            free = rows.index(None)
            slots.join(free, prompt, images, sampling)
            rows[free], found[number] = number, []
        most = max(most, sum(row is not None for row in rows))
        tokens = slots.step()
        for row, number in enumerate(rows):
            if number is not None:
                found[number].append(int(tokens[row]))
                # Some end early, and their places are taken.
                if len(found[number]) == (NEW if number % 4 else 3):
                    rows[row] = None
    assert most == slots.rows
    for number, tokens in found.items():
        assert tokens == expected[number][: len(tokens)], number
    assert len({tuple(tokens) for tokens in found.values()}) > 5


def test_the_slot_goes_round_and_nothing_changes(model, slots):
    chat = asked(model[0], 4)
    expected = alone(model, *chat)
    for _ in range(8):  # 8 times 12 tokens are more than the 76 slots of the cache
        slots.join(1, *chat)
        assert [int(slots.step()[1]) for _ in range(NEW)] == expected


@pytest.mark.parametrize("placed", [False, True])
def test_after_warming_up_nothing_is_compiled(model, placed):
    """Also with parameters that are tied to a device, as those of a checkpoint are."""
    config, params = model
    params = jax.device_put(params, jax.devices()[0]) if placed else params
    jax.clear_caches()  # the other turn's programs
    fresh = Slots(config, params, rows=2, prompt_tokens=64, new_tokens=NEW, images=2)
    warmed = list(fresh.warm())
    assert len(warmed) == len(set(warmed)) == 4
    events = []

    def listen(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for number in range(10):
            fresh.join(number % 2, *asked(model[0], number))
            fresh.step()
        assert not [event for event in events if "compile" in event]
        jax.jit(lambda x: x + 1)(1)
        assert [event for event in events if "compile" in event]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_clearing_forgets_every_row(model, slots):
    chat = asked(model[0], 5)
    slots.join(0, *asked(model[0], 2))
    slots.step()
    slots.clear()
    slots.join(2, *chat)
    assert [int(slots.step()[2]) for _ in range(NEW)] == alone(model, *chat)
