"""One layer of each tower against the record: what the TPU compiler makes of it has not changed.

`make plans` writes the record anew after an intended change.
"""

import json

import pytest

from internvl_jax import configuration
from internvl_jax.plan import layers, topology
from scripts import make_plans

RECORD = make_plans.FOLDER / "layers.json"


@pytest.mark.slow
@pytest.mark.parametrize("slice_", make_plans.LAYER_TOPOLOGIES)
def test_the_layers_of_both_towers_are_as_recorded(slice_):
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["layers"]
    with topology.opened(slice_) as devices:
        measured = layers.measure(make_plans.layer_config(slice_), slice_, devices)
    assert [layer.tower for layer in measured] == ["vit", "llama"]
    for layer in measured:
        wanted = recorded[f"{slice_} {layer.tower}"]
        assert layer.temp_gib == pytest.approx(wanted["temp_gib"], rel=0.02), layer
        assert layer.collective_gb == pytest.approx(wanted["collective_gb"], rel=0.02), layer


def test_every_recorded_plan_fits_with_room_to_spare():
    """Five per cent of memory, and on v5e no more than 13 GiB."""
    files = [file for file in sorted(make_plans.FOLDER.glob("*.json")) if file != RECORD]
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
