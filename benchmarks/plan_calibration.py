"""Predicted against published step times of training runs on real TPUs.

    python benchmarks/plan_calibration.py [--json FILE] [NAME …]   (minutes a recipe; needs libtpu)

Our LLaMA in the shapes, batch, mesh and remat of dense models whose speed MaxText's repository
publishes (its README files for TPU v5e and v5p; synthetic data, sequence 2048, AdamW in float32,
bfloat16 compute, Pallas flash attention). Published is TFLOP/s per chip of model work, which is
6 × parameters × tokens plus attention; the step time follows from it. Compiled is our train step
with our own Pallas attention, as `plan` compiles it, but that the compiler is asked for what the
published run asked: its own 16 MiB of vector memory for a fusion (96 on v6e), no SparseCores. What
is held out had no part in choosing any constant of `plan.schedule`. Our step holds more than
theirs, so some recipes run with fewer sequences per chip (`ours`); compared is then the same rate
at the smaller batch.
--json adds what is measured to the file, recipe by recipe.
"""

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from internvl_jax import compiler, configuration
from internvl_jax.models.config import LANGUAGE_MODELS, LanguageModelConfig, LlamaConfig
from internvl_jax.plan import chips, plan


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One published run; `rate` is model TFLOP/s per chip."""

    name: str
    topology: str
    width: int
    heads: int
    mlp: int
    layers: int
    per_chip: int  # sequences
    tensor: int
    remat: str
    rate: float
    ours: float | None = None  # sequences per chip that fit our model, where fewer: it holds more
    held_out: bool = False
    kv_heads: int | None = None  # None: as many as heads
    length: int = 2048
    vocabulary: int = 32_000
    slices: int = 1  # of the vocabulary (`losses.vocabulary_slices`)
    fusion: int | None = None  # MiB (`compiler.FUSIONS`); None: what the compiler allows

    @property
    def chips(self) -> int:
        sizes = chips.parse(self.topology)[1]
        return sizes[0] * sizes[1] * (sizes[2] if len(sizes) == 3 else 1)

    @property
    def work(self) -> float:
        """Published model FLOPs per chip and step; attention is counted in full, not causal."""
        columns = 2 * (self.heads + (self.kv_heads or self.heads)) * 128  # q, k, v, o
        layer = columns * self.width + 3 * self.width * self.mlp
        weights = self.layers * layer + self.vocabulary * self.width
        tokens = self.sequences * self.length
        return 6 * tokens * weights + self.attention

    @property
    def attention(self) -> float:
        return 12 * self.layers * self.sequences * self.length**2 * self.heads * 128

    @property
    def sequences(self) -> float:
        return self.per_chip if self.ours is None else self.ours


RECIPES = (
    Recipe("v5e-16B", "v5e:16x16", 4096, 64, 28672, 32, 6, 1, "full", 120),
    Recipe("v5e-32B", "v5e:16x16", 8192, 64, 28672, 32, 4, 1, "full", 132, ours=3),
    Recipe("v5e-64B", "v5e:16x16", 8192, 64, 28672, 64, 2, 1, "full", 118, held_out=True),
    Recipe("v6e-8B", "v6e:16x16", 4096, 32, 14336, 32, 4, 1, "projections", 417.4, ours=2,
           kv_heads=8, length=8192, vocabulary=128_256, slices=8, held_out=True,
           fusion=96),
    Recipe("v5p-32B", "v5p:4x4x4", 8192, 64, 28672, 32, 6, 4, "dots", 328, ours=5),
    Recipe("v5p-64B", "v5p:4x4x4", 8192, 64, 28672, 64, 3, 4, "dots", 323, ours=2.5),
    Recipe("v5p-128B-128", "v5p:4x4x8", 8192, 128, 57344, 64, 1, 8, "dots", 315, held_out=True),
    Recipe("v5p-128B-256", "v5p:4x8x8", 8192, 128, 57344, 64, 1, 8, "dots", 316),
)


def predict(recipe: Recipe) -> tuple[float | None, plan.Plan]:
    """Estimated seconds per step of our train step in a recipe's shape; None if it does not fit."""
    LANGUAGE_MODELS["calibration"] = LanguageModelConfig(
        LlamaConfig(recipe.vocabulary, recipe.width, recipe.layers, recipe.heads, recipe.mlp,
                    recipe.kv_heads, head_dim=128, dtype="bfloat16")
    )  # fmt: skip
    chip = chips.parse(recipe.topology)[0].name
    compiler.FUSIONS = {} if recipe.fusion is None else {chip: recipe.fusion}
    compiler.SPARSE_CORE = ()
    config = configuration.load("language")
    config.unlock()
    config.model.update(size="calibration", dtype="bfloat16", remat=recipe.remat)
    config.batch_size = round(recipe.sequences * recipe.chips)
    config.data.text_length = recipe.length
    config.objective_options = {"vocabulary_slices": recipe.slices}
    config.optimizer.update(weight_decay=0.1, b2=0.95)
    config.mesh.update(replica=1, fsdp=-1, tensor=recipe.tensor)
    made = plan.make(config, recipe.topology, dump=os.environ.get("DUMP"))
    return made.estimated_step_s, made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[r.name for r in RECIPES])
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    args = parser.parse_args()
    rows = []
    print(f"{'recipe':14} {'published s':>12} {'predicted s':>12} {'error':>7}")
    for recipe in RECIPES:
        if args.names and recipe.name not in args.names:
            continue
        published = recipe.work / (recipe.rate * 1e12)
        predicted, made = predict(recipe)
        row = {
            "recipe": recipe.name,
            "held_out": recipe.held_out,
            "published_s": published,
            "predicted_s": predicted,
            "error": None if predicted is None else predicted / published - 1,
            "plan": made.to_dict(),
        }
        rows.append(row)
        if args.json:
            add(args.json, row)
        if predicted is None:
            print(f"{recipe.name:14} {published:12.3f} {'—':>12}  needs {made.needed_gib:.1f} GiB")
            continue
        error = f"{100 * row['error']:+6.1f}%{' held out' if recipe.held_out else ''}"
        print(f"{recipe.name:14} {published:12.3f} {predicted:12.3f} {error}")
        print("   ", json.dumps(made.to_dict()), flush=True)
    known = [row for row in rows if row["error"] is not None]
    for label, some in (("all", known), ("held out", [row for row in known if row["held_out"]])):
        if some:
            median = statistics.median(abs(row["error"]) for row in some)
            print(f"{label:14} median error {100 * median:.1f} % of {len(some)} recipes")


def add(path: Path, row: dict[str, Any]) -> None:
    """Write a recipe's row into the file of results, in place of an earlier one of its name."""
    kept = json.loads(path.read_text(encoding="utf-8"))["recipes"] if path.exists() else []
    kept = [other for other in kept if other["recipe"] != row["recipe"]] + [row]
    order = [recipe.name for recipe in RECIPES]
    kept.sort(key=lambda other: order.index(other["recipe"]))
    path.write_text(json.dumps({"recipes": kept}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
