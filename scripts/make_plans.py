"""Record what the TPU compiler says of the published stages: the files under plans/.

    python scripts/make_plans.py [NAME …]      (all: hours; a whole step takes minutes to compile)

One file per stage and topology: the command that gives it, with the settings that fit there, and
the plan. `layers.json` holds what the layers of each tower need, compiled alone and with the
compiler's least effort: a test does it again. A file is written as soon as its plan is known.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the pod's devices exist only in the compiler

import jax

from internvl_jax import configuration
from internvl_jax.plan import layers, plan, topology

FOLDER = Path(__file__).resolve().parent.parent / "plans"
STAGES = {
    "stage1": ("stage1_contrastive", {}),
    "stage1_224": ("stage1_contrastive:224", {}),
    "stage2": ("stage2_generative", {}),
    # The batch of the paper's own mixture (A.3); the config's 128 are those of LLaVA-1.5.
    "stage3": ("stage3_sft", {"batch_size": 512, "mesh.replica": -1, "mesh.fsdp": 128}),
}
# What a stage is set to on each topology; the rest is as in its config. Memory that is left pays
# for fewer chunks first (each gathers the weights anew, and several need a pass for the features
# more), then for what the backward pass need not compute again and what stage 1 holds of a chunk.
_ATTENTION, _PROJECTIONS, _DOTS = (
    {"model.remat": policy} for policy in ("attention", "projections", "dots")
)
_BOTH = {"held_towers": 2}
SETTINGS: dict[str, dict[str, dict[str, int | str]]] = {
    # A 64th of a matrix of InternViT has an even number of rows, which the TPU's tiles take.
    "v5e:16x16": {
        "stage1": {"chunks": 5, "mesh.fsdp": 64},
        "stage1_224": {"chunks": 16, "mesh.fsdp": 64},
        "stage2": {"chunks": 4, **_ATTENTION},
        "stage3": {"chunks": 1},
    },
    "v6e:16x16": {
        "stage1": {"chunks": 4, "mesh.fsdp": 64, **_BOTH},
        "stage2": {"chunks": 1, "mesh.fsdp": 64},
        "stage3": {"chunks": 1, **_DOTS},
    },
    "v5p:4x4x4": {
        "stage1": {"chunks": 10, "mesh.fsdp": 32, **_DOTS},
        "stage2": {"chunks": 2, "mesh.fsdp": 64, **_ATTENTION},
        "stage3": {"chunks": 1, "mesh.fsdp": 64, **_PROJECTIONS},
    },
    "v5p:8x8x8": {
        "stage1": {"chunks": 1, **_ATTENTION},
        "stage2": {"chunks": 1, **_DOTS},
        "stage3": {"chunks": 1, **_DOTS},
    },
    "v4:4x8x8": {
        "stage1": {"chunks": 4, **_BOTH},
        "stage2": {"chunks": 1},
        "stage3": {"chunks": 1, **_PROJECTIONS},
    },
}
# Between them InternViT and LLaMA with their gradients, QLLaMA, and Vicuna.
LAYERS = [
    (stage, slice_)
    for slice_ in ("v5e:16x16", "v5p:8x8x8")
    for stage in ("stage1", "stage2", "stage3")
]


def names() -> list[str]:
    """"layers", then every "stage topology" in the order of the table."""
    return ["layers"] + [f"{stage} {slice_}" for slice_, own in SETTINGS.items() for stage in own]


def settings(stage: str, slice_: str) -> tuple[str, list[tuple[str, str]]]:
    """The config of a stage and its overrides on a topology."""
    config, always = STAGES[stage]
    return config, [(k, str(v)) for k, v in {**always, **SETTINGS[slice_][stage]}.items()]


def record(stage: str, slice_: str) -> None:
    config, overrides = settings(stage, slice_)
    made = plan.make(configuration.load(config, overrides), slice_)
    command = command_of(stage, slice_)
    write(file_of(stage, slice_), {"command": command, **versions(), "plan": made.to_dict()})
    print(command, made, sep="\n", flush=True)


def command_of(stage: str, slice_: str) -> str:
    """What a user types for the same plan; the settings also fit `internvl-jax train`."""
    config, overrides = settings(stage, slice_)
    flags = "".join(f" --config.{key}={value}" for key, value in overrides)
    return f"internvl-jax plan --config={config} --topology={slice_}{flags}"


def file_of(stage: str, slice_: str) -> Path:
    return FOLDER / f"{stage}_{slice_.replace(':', '_')}.json"


def measured_layers(stage: str, slice_: str) -> dict[str, dict[str, float]]:
    """Memory and bytes of a stage's towers over one chunk of its batch, by their names.

    The compiler's least effort takes a fifth of its time. It sends the same bytes and needs about
    the same memory, but the times of its programs mean nothing.
    """
    config = configuration.load(*settings(stage, slice_)).unlock()
    config.batch_size, config.chunks = config.batch_size // config.chunks, 1
    effort = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        with topology.opened(slice_) as devices:
            found = layers.measure(config.lock(), slice_, devices)
    finally:
        jax.config.update("jax_exec_time_optimization_effort", effort)
    return {
        f"{stage} {slice_} {layer.tower}": {
            "temp_gib": layer.temp_gib, "collective_gb": layer.collective_gb
        }
        for layer in found
    }  # fmt: skip


def record_layers() -> None:
    found: dict[str, Any] = {}
    for stage, slice_ in LAYERS:
        print(stage, slice_, own := measured_layers(stage, slice_), flush=True)
        found |= own
    write(FOLDER / "layers.json", {**versions(), "layers": found})


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    wrong = sorted(set(sys.argv[1:]) - set(names()))
    if wrong:
        sys.exit(f"error: no plan {wrong[0]!r}; plans: {', '.join(names())}")
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or names():
        started = time.monotonic()
        if name == "layers":
            record_layers()
        else:
            record(*name.split())
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
