"""The recorded plans: they fit with room to spare, and their commands are those of the settings.

One layer of each tower is compiled and compared with the record; `make plans` writes it anew after
an intended change.
"""

import json

import jax
import pytest

from internvl_jax import configuration
from scripts import make_inference_plans, make_plans

LAYERS = make_plans.FOLDER / "layers.json"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "slice_"), make_plans.LAYERS)
def test_the_layers_of_every_tower_are_as_recorded(stage, slice_):
    recorded = json.loads(LAYERS.read_text(encoding="utf-8"))["layers"]
    with jax.default_matmul_precision("default"):  # not that of the tests
        measured = make_plans.measured_layers(stage, slice_)
    assert measured.keys() == {n for n in recorded if n.startswith(f"{stage} {slice_} ")}
    for name, found in measured.items():
        assert found == pytest.approx(recorded[name], rel=0.02), name


def test_every_recorded_plan_fits_with_room_to_spare():
    """Five per cent of memory, and on v5e no more than 13 GiB."""
    files = sorted(make_plans.FOLDER.glob("stage*.json"))
    assert files
    for file in files:
        record = json.loads(file.read_text(encoding="utf-8"))
        plan = record["plan"]
        assert plan["fits"], file.name
        limit = 0.95 * plan["hbm_gib"]
        if plan["topology"].startswith("v5e"):
            limit = min(limit, 13.0)
        assert plan["peak_gib"] <= limit, file.name


def test_recorded_commands_are_those_of_the_settings():
    for name in make_plans.names()[1:]:
        file = make_plans.file_of(*name.split())
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            assert record["command"] == make_plans.command_of(*name.split())


def test_settings_name_real_config_keys():
    for name in make_plans.names()[1:]:
        config = configuration.load(*make_plans.settings(*name.split()))
        assert config.batch_size in (163_840, 20_480, 512)


def test_calls_of_inference_name_real_config_keys_and_records_are_theirs():
    for name, (_, mode, _, (config, overrides)) in make_inference_plans.ROWS.items():
        loaded = configuration.load(config, [(k, str(v)) for k, v in overrides.items()])
        assert loaded.mesh.fsdp == 1 and f"--inference={mode}" in make_inference_plans.command(name)
    if make_inference_plans.FILE.exists():
        recorded = json.loads(make_inference_plans.FILE.read_text(encoding="utf-8"))["plans"]
        for name, record in recorded.items():
            assert record["command"] == make_inference_plans.command(name)


def test_what_fits_a_chip_is_shown_as_it_was_recorded():
    recorded = json.loads(make_inference_plans.FILE.read_text(encoding="utf-8"))["plans"]
    table = make_inference_plans.table(recorded)
    root = make_plans.FOLDER.parent
    assert table in (root / "docs" / "serving.md").read_text(encoding="utf-8")
    notebook = json.loads((root / "launch/colab/quickstart.ipynb").read_text(encoding="utf-8"))
    assert any(table in "".join(cell["source"]) for cell in notebook["cells"])
