"""Record what fits a chip of 16 GB, as the TPU compiler computes it: plans/inference_v5e_1x1.json.

    python -m scripts.make_inference_plans [NAME …]      (all: minutes to an hour)

A record per call of a model: the command that gives it, and the plan. The file is written again as
soon as another plan is known. `table` is what the documentation and the notebook show of it.
"""

import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the chip exists only in the compiler

from internvl_jax import configuration
from internvl_jax.plan import plan
from scripts import make_plans

TOPOLOGY = "v5e:1x1"
FILE = make_plans.FOLDER / "inference_v5e_1x1.json"

_CHIP = {"mesh.replica": 1, "mesh.fsdp": 1}
_IMAGES = {"batch_size": 8, **_CHIP}
_TALK = {  # one conversation about a picture of 448 pixels: 1,024 positions and room for as many
    "batch_size": 1, "model.projector": "pixel_shuffle", "model.select_layer": -1,
    "model.image_size": 448, "data.image_size": 448, "data.text_length": 1024, **_CHIP,
}  # fmt: skip


def _talk(size: str) -> tuple[str, dict[str, Any]]:
    return "stage3_sft", {"model.size": size, **_TALK}


_STAGE1 = ("stage1_contrastive:224", _IMAGES)
_STAGE2 = ("stage2_generative", _IMAGES)
_TOWER = (_STAGE1[0], {"model.family": "vision", "model.size": "6b", **_IMAGES})
# name → (model as the table has it, call, weights, (config, overrides))
ROWS: dict[str, tuple[str, str, str | None, tuple[str, dict[str, Any]]]] = {
    "vit": ("InternViT-6B, 8 pictures of 224", "encode", None, _TOWER),
    "2.5_1b": ("InternVL 2.5 1B", "prefill", None, _talk("2.5_1b")),
    "2.5_2b": ("InternVL 2.5 2B", "prefill", None, _talk("2.5_2b")),
    "2.5_4b": ("InternVL 2.5 4B", "prefill", None, _talk("2.5_4b")),
    "2.5_8b": ("InternVL 2.5 8B", "prefill", None, _talk("2.5_8b")),
    "2.5_8b_int8": ("InternVL 2.5 8B", "prefill", "int8", _talk("2.5_8b")),
    "2.5_8b_int8_decode": ("InternVL 2.5 8B", "decode", "int8", _talk("2.5_8b")),
    "14b": ("InternVL-14B, 8 pictures of 224", "encode", None, _STAGE2),
    "14b_int8": ("InternVL-14B, 8 pictures of 224", "encode", "int8", _STAGE2),
    "14b_int8_prefill": ("InternVL-14B, 8 captions", "prefill", "int8", _STAGE2),
}


def command(name: str) -> str:
    """What a user types for the same plan."""
    _, mode, weights, (config, overrides) = ROWS[name]
    flags = "".join(f" --config.{key}={value}" for key, value in overrides.items())
    kind = f" --weights={weights}" if weights else ""
    return f"internvl-jax plan --inference={mode}{kind} --config={config} --topology={TOPOLOGY}" + (
        flags
    )


def record(name: str) -> dict[str, Any]:
    _, mode, weights, (config, overrides) = ROWS[name]
    loaded = configuration.load(config, [(k, str(v)) for k, v in overrides.items()])
    made = plan.make(loaded, TOPOLOGY, inference_mode=mode, weights=weights)
    print(command(name), made, sep="\n", flush=True)
    return {"command": command(name), "plan": made.to_dict()}


def table(records: dict[str, Any]) -> str:
    """Markdown: model, call, weights, GiB of the chip's."""
    total = next(iter(records.values()))["plan"]["hbm_gib"]
    lines = [
        f"| model | call | weights | GiB of {total} | |",
        "|---|---|---|---|---|",
    ]
    for name, (model, mode, weights, _) in ROWS.items():
        if name in records:
            found = records[name]["plan"]
            need = found["peak_gib"] if found["fits"] else found["needed_gib"]
            fits = "fits" if found["fits"] else "does not fit"
            lines.append(f"| {model} | {mode} | {weights or 'bfloat16'} | {need:.1f} | {fits} |")
    return "\n".join(lines)


def main() -> None:
    wrong = sorted(set(sys.argv[1:]) - set(ROWS))
    if wrong:
        sys.exit(f"error: no plan {wrong[0]!r}; plans: {', '.join(ROWS)}")
    for name in sys.argv[1:] or ROWS:
        known = json.loads(FILE.read_text("utf-8"))["plans"] if FILE.exists() else {}
        known[name] = record(name)
        ordered = {n: known[n] for n in ROWS if n in known}
        make_plans.write(FILE, {**make_plans.versions(), "plans": ordered})
    print(table(ordered))


if __name__ == "__main__":
    main()
