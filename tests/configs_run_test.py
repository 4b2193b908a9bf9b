"""Every config's `:tiny` runs from the command line, on the weights of the stage before."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from internvl_jax import cli, loading
from tests.compiling import XLA_FLAGS

# One device and quick compilation: what is computed is tested elsewhere.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
# config → the configs from whose runs it starts
STARTS = {
    "language:tiny": (),
    "stage1_contrastive:tiny": ("language:tiny",),
    "stage1_contrastive:224,tiny": ("stage1_contrastive:tiny",),
    "stage2_generative:tiny": ("stage1_contrastive:tiny", "language:tiny"),
    "stage3_sft:projector,tiny": ("stage2_generative:tiny",),
    "stage3_sft:tiny": ("stage2_generative:tiny",),
    "stage3_sft:qllama,tiny": ("stage2_generative:tiny",),
    "finetune_retrieval:tiny": ("stage2_generative:tiny",),
    "finetune_retrieval:lora,tiny": ("stage2_generative:tiny",),
}
# Their code paths beyond the other variants are small, their compilation is not.
SLOW = {name for name in STARTS if "," in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function: name of a config → work directory of its finished run, trained once."""
    root = tmp_path_factory.mktemp("runs")
    done: dict[str, tuple[Path, str]] = {}

    def train(name: str) -> tuple[Path, str]:
        if name not in done:
            workdir = root / name.replace(":", "_")
            starts = ",".join(str(train(start)[0]) for start in STARTS[name])
            words = [f"--config={name}", f"--workdir={workdir}", f"--config.init_from={starts}"]
            run = subprocess.run(
                [sys.executable, "-m", "internvl_jax.cli", "train", *words],
                capture_output=True, text=True, env=ENVIRONMENT,
            )
            assert run.returncode == 0, run.stderr
            done[name] = workdir, run.stderr
        return done[name]

    return train


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in STARTS]
)
def test_tiny_config_trains_from_the_stage_before(trained, name):
    workdir, printed = trained(name)
    settings = json.loads((workdir / "config.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == settings["steps"]
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    for start in STARTS[name]:
        assert f"from {trained(start)[0]}" in printed


def test_convert_to_official_weights_and_back(trained, tmp_path, capsys):
    work = str(trained("stage2_generative:tiny")[0])
    exported, back = str(tmp_path / "exported"), str(tmp_path / "back")
    cli.main(["convert", work, exported, "--layout=internvl-14b"])
    assert json.loads(Path(exported, "config.json").read_text())["model_type"] == "internvl"
    cli.main(["convert", exported, back, "--layout=jax"])
    assert f"wrote {back}" in capsys.readouterr().out
    first, second = loading.load(work), loading.load(back)
    assert first.config == second.config and first.tokenizer.digest == second.tokenizer.digest
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first.params, second.params)
    assert all(jax.tree.leaves(same))

    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", exported, back, "--layout=jax"])
    assert caught.value.code == 1 and "already exists" in capsys.readouterr().err


def test_evaluate_writes_what_it_prints(trained, tmp_path, capsys):
    work, figures = trained("stage2_generative:tiny")[0], tmp_path / "figures.json"
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", f"--checkpoint={work}", "--evals=relatoin"])
    assert caught.value.code == 2 and "relation" in capsys.readouterr().err

    cli.main(["evaluate", f"--checkpoint={work}", "--evals=relation", f"--json={figures}"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    values = json.loads(figures.read_text())["figures"]
    assert values and all(0 <= value <= 1 for value in values.values())
    assert printed == {name: f"{100 * value:.2f}" for name, value in values.items()}


def test_generate_describes_an_image(trained, tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / "red.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    work = trained("stage2_generative:tiny")[0]
    cli.main(["generate", f"--checkpoint={work}", f"--image={picture}", "--language=es"])
    assert capsys.readouterr().out.endswith("\n")
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", f"--checkpoint={work}", f"--image={picture}", "--question=Why?"])
    assert caught.value.code == 1 and "chat checkpoint" in capsys.readouterr().err
