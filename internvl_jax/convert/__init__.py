"""Official PyTorch checkpoints in and out: one table of rules per layout, used both ways."""

from internvl_jax.convert.layouts import LAYOUTS, export, load_torch_layout, read_params

__all__ = ["LAYOUTS", "export", "load_torch_layout", "read_params"]
