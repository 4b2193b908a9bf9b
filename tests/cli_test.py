"""The command line as users meet it: a real process, its exit code and its last line."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from internvl_jax import cli

ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    return subprocess.run(
        [sys.executable, "-m", "internvl_jax.cli", *words],
        capture_output=True, text=True, cwd=ROOT,
    )


def fails(capsys, *words) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("error: ")
    return caught.value.code, printed


@pytest.mark.parametrize(
    "words, hint",
    [
        ((), "name a command: train, evaluate"),
        (("trian",), "unknown command 'trian'; nearest: train"),
        (("train", "--confg=language"), "unknown flag --confg; nearest: --config"),
        (("train", "--config", "language"), "required: --workdir"),
        (("convert", "a", "b", "--lay=x"), "unknown flag --lay; nearest: --layout"),
        (("demo", "--config.steps=1"), "unknown flag --config.steps"),
        (("train", "--config=stage1", "--workdir=w"), "nearest: stage1_contrastive"),
        (("train", "--config=language:tiny", "--config.stepz", "3", "--workdir=w"), "steps"),
    ],
)
def test_unknown_names_exit_with_two_and_one_line(capsys, words, hint):
    code, line = fails(capsys, *words)
    assert code == 2 and hint in line


def test_errors_of_the_user_exit_with_one_and_one_line(capsys, tmp_path):
    jax.devices()  # as in a notebook: a program that has used JAX trains on its own
    code, line = fails(capsys, "evaluate", f"--checkpoint={tmp_path / 'nowhere'}")
    assert code == 1 and "no checkpoint at" in line
    code, line = fails(capsys, "generate", "--checkpoint=demo", "--image=no.png")
    assert code == 1 and "no.png" in line
    words = ("--config=language:tiny", "--config.mesh.tensor=3", f"--workdir={tmp_path / 'w'}")
    code, line = fails(capsys, "train", *words)
    assert code == 1 and "does not fit 8 cpu device(s)" in line
    code, line = fails(capsys, "train", *words, "--coordinator_address=localhost:1")
    assert code == 1 and "cannot join a job any more" in line
    assert not (tmp_path / "w").exists()


def test_a_mistake_in_the_program_keeps_its_traceback(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(arg=''):\n    return {}['missing']\n")
    done = run("train", f"--config={broken}", "--workdir=w")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError" in done.stderr


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in cli.COMMANDS)
