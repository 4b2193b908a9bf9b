"""`internvl-jax chat` as a process that reads questions from its input."""

import subprocess
import sys

import pytest
from PIL import Image

from internvl_jax import load
from internvl_jax.data.sources import EmbeddedScenes


@pytest.mark.slow
def test_a_conversation_in_the_terminal(tmp_path):
    source = EmbeddedScenes("test_single", size=2, image_size=64)
    for n in range(2):
        Image.fromarray(source.image(n)).save(tmp_path / f"{n}.png")
    question = "what color is the object?"
    lines = (question, "/image nowhere.png", f'/image "{tmp_path / "1.png"}"', question, "/what")
    lines += ("/reset", f"/image {tmp_path / '1.png'}", question, "/exit", "not read")
    command = [sys.executable, "-m", "internvl_jax.cli", "chat", "--checkpoint=demo-chat"]
    command += [f"--image={tmp_path / '0.png'}", "--max_new_tokens=12"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    help_line, first, missing, second, again, third, *rest = done.stdout.splitlines()
    model, mark = load("demo-chat"), "<image>\n"
    pictures = [source.image(n) for n in range(2)]

    def answer(rounds, images):
        return "".join(model.reply(rounds, images, max_new_tokens=12))

    one = answer([(mark + question, None)], pictures[:1])
    assert first == f"> {one}" and "nowhere.png" in missing and rest == ["> "]
    assert second == f"> > {answer([(mark + question, one), (mark + question, None)], pictures)}"
    assert again == f"> {help_line}"
    assert third == f"> > > {answer([(mark + question, None)], pictures[1:])}"
