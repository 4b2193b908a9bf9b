"""Every cell of the notebooks, run in a kernel as Colab does, in an empty folder."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.compiling import XLA_FLAGS

COLAB = Path(__file__).parents[2] / "launch" / "colab"


def run(name, folder, **fields):
    """The notebook after all its cells have run there, with other values in its form fields."""
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    for field, value in fields.items():
        found = 0
        for cell in notebook.cells:
            pattern = rf"(?m)^{field} = .*?(?=  # @param)"
            cell.source, count = re.subn(pattern, f"{field} = {value!r}", cell.source)
            found += count
        assert found == 1, field
    # One device, as a user has; programs run a few times only.
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env={**environment, "JAX_PLATFORMS": "cpu"})
    return notebook


def printed(cell):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def pictures(cell):
    return [o for o in cell.outputs if "image/png" in o.get("data", {})]


def cell_of(notebook, title):
    (cell,) = [c for c in notebook.cells if f"# @title {title}" in c.source]
    return cell


@pytest.mark.parametrize("name", ["quickstart", "train", "convert"])
def test_notebooks_are_valid_without_outputs_and_with_form_fields(name):
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(cell.source.startswith("# @title ") for cell in code)
    assert code[0].source.startswith("# @title Install")
    # The install cell holds the preinstalled JAX where it is.
    assert '"--constraint"' in code[0].source and '"jax"' in code[0].source
    assert "# @param" in code[1].source


@pytest.mark.slow
def test_quickstart_reaches_zero_shot_in_five_cells_and_shows_all(tmp_path):
    notebook = run("quickstart", tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    zero_shot = cell_of(notebook, "Zero-shot classification")
    assert code.index(zero_shot) < 5
    assert float(re.search(r"([\d.]+)% of 200", printed(zero_shot))[1]) > 85
    assert len(pictures(zero_shot)) == 1
    assert len(pictures(cell_of(notebook, "Retrieval"))) == 1
    captions = printed(cell_of(notebook, "Captions"))
    assert [line[:2] for line in captions.splitlines()] == ["en", "zh", "ko", "es"]
    fits = printed(cell_of(notebook, "What fits"))
    assert re.search(r"InternVL-14B: 1[34].\d B parameters, .* in bfloat16 does not fit", fits)
    assert re.search(r"InternVL-14B: .* in int8 fits", fits)


@pytest.mark.slow
def test_train_goes_through_all_stages_and_continues(tmp_path):
    notebook = run("train", tmp_path, SHARE=0.01)
    assert len(pictures(cell_of(notebook, "Loss curves"))) == 1
    assert len(pictures(cell_of(notebook, "What it has learnt"))) == 1
    steps = sorted(path.name for path in (tmp_path / "runs" / "demo").iterdir())
    assert steps == sorted(
        ["language", "contrastive", "multilingual", "generative", "projector", "sft"]
    )


@pytest.mark.slow
def test_convert_there_and_back_is_the_same_model(tmp_path):
    notebook = run("convert", tmp_path)
    same = printed(cell_of(notebook, "The three are the same model"))
    assert float(re.search(r"largest difference of a logit: (\S+)", same)[1]) < 1e-4
    assert (tmp_path / "exported" / "internvl-14b" / "config.json").exists()
