import dataclasses

import pytest

from internvl_jax import configuration
from internvl_jax.plan import layers, suggest, topology

CANDIDATE = suggest.Candidate((2, 128, 1), 5, "dots", 1.0, 2.0**30, True)


def test_meshes_divide_the_model_and_fill_the_pod():
    pod = list(range(256))
    found = suggest.meshes(configuration.load("stage1_contrastive"), pod)
    # The vision tower's width, 3200 = 128 · 25, allows no more than 128 shards.
    assert found == [(2, 128, 1), (4, 64, 1), (1, 128, 2), (1, 64, 4)]


def test_a_candidate_is_a_config_and_the_flags_that_give_it():
    config = configuration.load("stage1_contrastive")
    own = suggest.changed(config, CANDIDATE)
    words = [flag.removeprefix("--config.").partition("=") for flag in CANDIDATE.flags.split()]
    flags = [(key, value) for key, _, value in words]
    assert own.to_dict() == configuration.load("stage1_contrastive", flags).to_dict()
    assert (own.mesh.replica, own.chunks, own.model.remat) == (2, 5, "dots")
    assert config.chunks == 10  # untouched


def test_a_candidate_that_ran_out_of_memory_has_no_time():
    refused = dataclasses.replace(CANDIDATE, seconds=0.0, fits=False)
    assert str(CANDIDATE).split()[:2] == ["1.00", "s"]
    assert str(refused).split()[:3] == ["—", "1.00", "GiB,"]


@pytest.mark.slow
def test_candidates_are_ranked_by_compiled_layers():
    config = configuration.load("language:tiny")
    told = []
    with topology.opened("v5e:2x2") as devices:
        found = suggest.rank(config, "v5e:2x2", devices, told.append)
        again = suggest.changed(config, found[0])
        parts = layers.measure(again, "v5e:2x2", devices)
        seconds = sum(part.turns * part.estimated_s for part in parts)
    assert len(told) == len(found) and all(candidate.fits for candidate in found)
    assert {candidate.remat for candidate in found} >= {"full", "dots", "none"}
    assert found[0].seconds == min(candidate.seconds for candidate in found)
    assert found[0].seconds == pytest.approx(seconds, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("held", "vit", "llama"), [(0, 1, 1), (1, 1, 2), (2, 1, 1)])
def test_features_take_the_turns_that_the_step_has(held, vit, llama):
    """Two chunks: both in one turn; or the first alone, and for a tower not held the second too."""
    flags = [("chunks", "2"), ("held_towers", str(held))]
    config = configuration.load("stage1_contrastive:tiny", flags)
    with topology.opened("v5e:2x2") as devices:
        found = {(p.tower, p.part): p for p in layers.measure(config, "v5e:2x2", devices)}
    assert found["vit", "features"].turns == vit
    assert found["llama", "features"].turns == llama
    assert found["vit", "gradient"].turns == found["llama", "gradient"].turns == 2
