"""Experiments: one file each, with `get_config(arg) -> ConfigDict`; see README.md, "Configs"."""
