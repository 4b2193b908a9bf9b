"""Official PyTorch checkpoints in and out: one table of rules per layout, used both ways."""

from internvl_jax.convert.layouts import (
    LAYOUTS,
    Export,
    export,
    load_torch_layout,
    open_torch_layout,
    plan_export,
    read_params,
)
from internvl_jax.convert.safetensors_files import holds_weights

__all__ = [
    "LAYOUTS",
    "Export",
    "export",
    "holds_weights",
    "load_torch_layout",
    "open_torch_layout",
    "plan_export",
    "read_params",
]
