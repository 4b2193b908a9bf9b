"""The data pipeline of an experiment."""

from collections.abc import Sequence
from typing import Any

from internvl_jax.data import pipelines
from internvl_jax.data.tokenizer import Tokenizer


def batches_of(
    config: Any, model_config: Any, rows: Sequence[int] | None = None, **changes: Any
) -> tuple[pipelines.Pipeline, Tokenizer]:
    """The pipeline of `config.data` for a model, and its tokenizer.

    rows: those of every batch to make; None for all. changes: of the fields of `config.data`.
    """
    fields = {**dict(config.data), **changes}
    tokenizer = Tokenizer(fields.pop("tokenizer", "") or None)
    pipeline = pipelines.build(
        **fields,
        batch_size=config.batch_size,
        seed=config.seed,
        tokenizer=tokenizer,
        num_image_tokens=getattr(model_config, "tokens_per_image", 0),
        rows=rows,
    )
    return pipeline, tokenizer
