"""Software pipelining inside a Pallas TPU kernel."""

from collections.abc import Callable, Sequence

import jax
from jax.experimental import pallas as pl

Stage = Callable[[jax.Array | int, int], None]


def run(stages: Sequence[Stage], items: int) -> None:
    """Run `stage(item, slot)` for every item and stage, in the order of the stages.

    Stage i works on item t − i at step t, so that vector and matrix work of different items stand
    side by side for the compiler to interleave. An item keeps its slot of the scratch buffers, of
    which there are as many as stages, through all of them. Steps in which every stage has an item
    are a loop; those at both ends run the stages that have one, and know their items.
    """
    depth = len(stages)
    turns = max(0, items - depth + 1) // depth

    def at_an_end(step: int) -> None:
        for stage in reversed(range(depth)):
            if 0 <= step - stage < items:
                stages[stage](step - stage, (step - stage) % depth)

    for step in range(depth - 1):
        at_an_end(step)

    if turns:

        @pl.loop(0, turns)
        def _(turn):
            for i in range(depth - 1, 2 * depth - 1):
                for stage in reversed(range(depth)):
                    stages[stage](turn * depth + i - stage, (i - stage) % depth)

    for step in range(depth - 1 + turns * depth, items + depth - 1):
        at_an_end(step)
