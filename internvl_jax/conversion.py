"""A whole conversion: a checkpoint of any kind to a checkpoint of another, a tensor at a time.

`plan` opens the source, checks every key and shape against both sides, and reads no weights;
`Conversion.report` says what would happen, and `Conversion.write` does it. The target appears
complete or not at all, and no more than a few tensors are in memory.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from internvl_jax import convert
from internvl_jax.convert import model_card
from internvl_jax.convert.safetensors_files import READ_AHEAD, SHARD_BYTES, new_directory
from internvl_jax.models import ModelConfig, from_dict, to_dict
from internvl_jax.train import streaming

OURS = "jax"
# What lies beside weights and goes along with them.
COMPANIONS = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_RUNTIME_BYTES = 500_000_000  # of Python, JAX and TensorStore themselves


class ConversionError(ValueError):
    """What is asked for cannot be converted or has no room."""


def layouts() -> tuple[str, ...]:
    """Names that `plan` takes as a target."""
    return (OURS, *convert.LAYOUTS)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and not begun.

    source: the path it reads. origin: what was found there. parameters: {path: parameter as it will
    be}. ignored: keys of the source that have no place and need none. export: how it will stand in
    an official layout, None for our own.
    """

    source: Path
    origin: str
    layout: str
    config: ModelConfig
    parameters: Mapping[str, streaming.Parameter]
    experiment: Mapping[str, Any]
    ignored: Sequence[str]
    companions: Sequence[Path]
    export: convert.Export | None

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """{name: (shape, dtype)} of what will be written."""
        if self.export is not None:
            return {key: (s.shape, s.dtype) for key, s in self.export.tensors.specs.items()}
        return {path: (p.shape, p.dtype) for path, p in self.parameters.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(_bytes(shape, dtype) for shape, dtype in self.tensors.values())

    @property
    def peak_bytes(self) -> int:
        """About how much memory the conversion takes."""
        if self.export is not None:
            pieces, flying = self.tensors.values(), READ_AHEAD + 2
        else:
            pieces, flying = [_piece(p) for p in self.parameters.values()], streaming.WORKERS
        blocks = [getattr(p, "block_bytes", 0) for p in self.parameters.values()]
        largest = max((_bytes(shape, dtype) for shape, dtype in pieces), default=0)
        return _RUNTIME_BYTES + 2 * flying * largest + flying * max(blocks, default=0)

    def report(self) -> str:
        """What would happen, for people."""
        shapes = [shape for shape, _ in self.tensors.values()]
        dtypes = ", ".join(sorted({str(dtype) for _, dtype in self.tensors.values()}))
        files = max(-(-self.nbytes // SHARD_BYTES), 1)
        lines = [
            f"from        {self.source}: {self.origin}",
            f"to          layout {self.layout}, {dtypes}"
            + (f", about {files} file(s)" if self.export else ""),
            f"tensors     {len(shapes):,}",
            f"parameters  {sum(map(math.prod, shapes)):,}",
            f"size        {self.nbytes / 1e9:.3f} GB",
            f"memory      about {self.peak_bytes / 1e9:.1f} GB",
            f"beside      {', '.join(file.name for file in self.companions) or 'nothing'}",
            f"no place    {len(self.ignored)} key(s)" + "".join(f"\n    {k}" for k in self.ignored),
        ]
        return "\n".join(lines)

    def write(self, target: str | os.PathLike) -> list[str]:
        """Carry it out; returns the names of what lies in `target`, which must not exist.

        Raises FileExistsError, ConversionError where the disk has no room, and FileError or
        CheckpointCorrupt where the source turns out to be damaged; `target` is then absent.
        """
        parent = _existing_parent(Path(target).absolute())
        free = shutil.disk_usage(parent).free
        if free < self.nbytes:
            raise ConversionError(
                f"{target} needs {self.nbytes / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB "
                "free; make room or choose another place"
            )
        with new_directory(target) as directory:
            for file in self.companions:
                shutil.copy(file, directory / file.name)
            if self.export is not None:
                self.export.write(directory)
            else:
                streaming.save_params(directory, self.parameters, config=self.experiment)
                tensors = [(shape, str(dtype)) for shape, dtype in self.tensors.values()]
                card = model_card.text(self.config, OURS, tensors)
                (directory / "README.md").write_text(card, "utf-8")
            return sorted(file.name for file in directory.iterdir())


def plan(source: str | os.PathLike, layout: str, dtype: Any = None) -> Conversion:
    """Open and check a conversion without reading weights.

    Args:
        source: a file or folder in an official layout, or a work directory, step or checkpoint of
            ours.
        layout: of the target, one of `layouts()`.
        dtype: of floating-point parameters in the target; None keeps what is stored.

    Raises:
        ConversionError: no such source or layout, or no such dtype. MappingError: all keys that are
            missing, unexpected or of another shape. FileError, ConfigError, CheckpointError: what
            the source is instead of a sound checkpoint.
    """
    source = Path(source)
    if layout not in layouts():
        raise ConversionError(f"unknown layout {layout!r}; choose from {', '.join(layouts())}")
    if not source.exists():
        raise ConversionError(f"there is no {source} to convert")
    dtype = _dtype(dtype)
    if is_official(source):
        opened = convert.open_torch_layout(source, dtype)
        config, parameters, ignored = opened.config, opened.leaves, opened.ignored
        beside = source if source.is_dir() else source.parent
        origin = f"layout {opened.layout}, {len(opened.tensors.files)} file(s)"
        experiment = {"model": to_dict(config), "data": {}}
        companions = companion_files(beside)
    else:
        stored, meta = streaming.open_params(source)
        parameters, ignored = {n: streaming.as_stored(p, dtype) for n, p in stored.items()}, ()
        experiment = meta["config"]
        if "model" not in (experiment or {}):
            raise ConversionError(f"{source} does not record which model it holds")
        config = from_dict(experiment["model"])
        origin = f"a checkpoint of ours, {len(stored)} arrays"
        companions = companion_files(source)
        tokenizer = Path(experiment.get("data", {}).get("tokenizer") or "")
        if tokenizer.is_file() and not any(c.name == "tokenizer.model" for c in companions):
            companions.append(tokenizer)
    export = None if layout == OURS else convert.plan_export(parameters, config, layout)
    return Conversion(
        source, origin, layout, config, parameters, experiment, ignored, companions, export
    )


def is_official(path: Path) -> bool:
    """Whether weights in an official layout lie there, rather than a checkpoint of ours."""
    return convert.holds_weights(path)


def companion_files(directory: Path) -> list[Path]:
    """The files in a folder of weights that go along with them."""
    return [directory / name for name in COMPANIONS if (directory / name).is_file()]


def _dtype(name: Any) -> Any:
    if name is None:
        return None
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ConversionError(f"dtype {name!r}: choose bfloat16, float16 or float32")
    return dtype


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _piece(parameter: streaming.Parameter) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of the rows of a parameter that are read at once."""
    rows = streaming.chunk_shape(parameter.shape, jnp.dtype(parameter.dtype).itemsize)[:1]
    return (*rows, *parameter.shape[1:]), parameter.dtype


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.is_dir())
