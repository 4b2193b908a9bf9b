"""Every command of the README and the documentation is run here, or carries a reason why not.

A block of code (`sh`, `python`) is run, page by page, in an empty folder; dry runs of the launchers
in the repository. Not run is a block with the comment `<!-- not run: reason -->` before it; and of
the README's, what README below says, command by command.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import XLA_FLAGS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "launch" / "README.md", *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\s*\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)

# Commands of the README by their beginning → why they are not run; or (old, new): what is replaced
# before they are. Work directories of `make demo` become what ships with the package.
README = {
    "make demo": "continuous integration runs it after the tests (.ci/run)",
    "make test": "it is what runs this",
    "pip install -e": "the tests run on the result of it",
    "internvl-jax train --config=stage1_contrastive:tiny": (
        "runs/try", "runs/try --config.steps=3",
    ),
    "internvl-jax train --config=stage1_contrastive --workdir": "needs a pod: 13 B parameters",
    "NAME=stage1 ZONE": ("launch/", f"{ROOT}/launch/"),
    "internvl-jax plan": "minutes of the TPU compiler; tests/plan has smaller ones",
    "internvl-jax evaluate --checkpoint=runs": ("runs/demo/generative", "demo"),
    "internvl-jax evaluate --checkpoint=demo": "tests/evals runs each protocol on this checkpoint",
    "internvl-jax evaluate --checkpoint=checkpoints": "needs downloaded weights and data",
    "internvl-jax chat": "reads a terminal; tests/commands/chat_test.py types into one",
    "internvl-jax serve": "does not end; tests/server asks a server",
    "internvl-jax web": "does not end; tests/web opens it in a browser",
    "internvl-jax generate": ("runs/demo/sft", "demo-chat"),
    "internvl-jax convert InternVL-14B": "needs 28 GB of downloaded weights",
    "internvl-jax convert runs/flickr30k": (
        "runs/flickr30k", f"{ROOT}/internvl_jax/assets/demo/internvl",
    ),
    "internvl-jax convert chinese-llama": "needs 14 GB of downloaded weights",
    "internvl-jax convert vicuna": "needs 26 GB of downloaded weights",
    "cat > data/mine.jsonl": "its pictures are the user's; docs/guides/your_data.md has some",
    "internvl-jax train --config=finetune_retrieval --workdir=runs/mine": (
        "needs downloaded weights; docs/guides/your_data.md runs the same on a small model"
    ),
    "import internvl_jax": ("runs/demo/generative", "demo"),
}  # fmt: skip
# What the README takes for granted: a picture, and an array of pictures.
PICTURE = """
from PIL import Image
from internvl_jax.data import scenes
pixels = scenes.render([scenes.scene("test_single", number) for number in range(2)])
Image.fromarray(pixels[0]).save("photo.png")
"""


def blocks(page):
    """(kind, code, reason or None) of the code blocks of a page that hold commands."""
    for match in BLOCK.finditer(PAGES[page].read_text(encoding="utf-8")):
        if match["kind"] in ("sh", "python"):
            yield match["kind"], match["code"], match["reason"]
        else:
            assert match["kind"] in ("text", "json", "yaml"), f"{page}: say what {match[0]} is"


def commands(code):
    """The commands of a shell block, each with its continued lines and here-document."""
    lines, current, end = [], "", None
    for line in code.splitlines():
        current += line + "\n"
        here = re.search(r"<<-?'?(\w+)'?", line)
        end = here[1] if here else end
        if end is not None and line.strip() != end:
            continue
        if end is None and line.endswith("\\"):
            continue
        if current.strip() and not current.startswith("#"):
            lines.append(current)
        current, end = "", None
    assert not current.strip(), current
    return lines


def readme_rule(command):
    found = [rule for start, rule in README.items() if command.startswith(start)]
    assert len(found) == 1, f"README.md: neither run nor excused: {command}"
    return found[0]


def script(page):
    """What of a page is run: (kind, code) in its order."""
    for kind, code, reason in blocks(page):
        if reason is not None:
            continue
        if page != "README.md":
            yield kind, code
            continue
        for command in commands(code) if kind == "sh" else [code]:
            rule = readme_rule(command)
            if isinstance(rule, tuple):
                assert rule[0] in command, command
                command = command.replace(*rule)
                yield kind, PICTURE + command if kind == "python" else command


def run(kind, code, folder):
    program = ["bash", "-euo", "pipefail", "-c", code]
    if kind == "python":
        program = [sys.executable, "-c", code]
    # One device, as a user has; programs run a few times only.
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def is_quick(code):
    """Whether a block starts no JAX."""
    return "launch/" in code and "--dry-run" in code


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_excused(page):
    for kind, code, reason in blocks(page):
        assert reason is None or len(reason) > 10, f"{page}: a reason, please: {code}"
        if page == "README.md":
            for command in commands(code) if kind == "sh" else [code]:
                readme_rule(command)


def test_no_excuse_outlives_its_command():
    found = "".join(code for _, code, _ in blocks("README.md"))
    for start in README:
        assert start in found, f"README.md no longer has {start}"


def test_dry_runs_print_what_would_run():
    count = 0
    for page in PAGES:
        for kind, code in script(page):
            if is_quick(code):
                run(kind, code, ROOT)
                count += 1
    assert count >= 4


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_work(page, tmp_path):
    python = ""
    for kind, code in script(page):
        if is_quick(code):
            continue
        if kind == "python":
            # A page's blocks of Python build on one another.
            python += code
            continue
        if python:
            run("python", python, tmp_path)
            python = ""
        run(kind, code, tmp_path)
    if python:
        run("python", python, tmp_path)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", f"--site-dir={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "reference" / "internvl_jax.loading.html").read_text()
    assert "encode_image" in page and "LoadError" in page
    assert "byte_identical" in (tmp_path / "results.html").read_text()
    assert "skypilot.yaml" in (tmp_path / "launch.html").read_text()
    # Nothing is fetched from elsewhere when a page is opened.
    for file in tmp_path.rglob("*.html"):
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:", file.read_text())
