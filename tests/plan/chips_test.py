import pytest

from internvl_jax.plan import chips


def test_a_topology_is_a_chip_and_a_shape():
    chip, shape = chips.parse("v5e:16x16")
    assert (chip.name, shape) == ("v5e", (16, 16))
    assert chips.parse("v5p:8x8x8")[1] == (8, 8, 8)
    assert chips.parse("v5p:8x16x16")[1] == (8, 16, 16)  # beyond the list: multiples of 4


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ("v9:2x2", "chips: v4, v5e, v5p, v6e, tpu7x"),
        ("v5e:2x2x2", "v5e:16x16"),
        ("v5e:3x3", "v5e:4x8"),
        ("v5p:5x4x4", "v5p:4x4x4"),
        ("v5p:64x64x64", "multiples of 4"),
        ("v5e", "v5e:1x1"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(wrong, shown):
    with pytest.raises(chips.TopologyError, match=shown):
        chips.parse(wrong)


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_the_clock_explains_the_peak(chip):
    arrays = {"v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)}
    if chip.name in arrays:
        count, side = arrays[chip.name]
        assert 2 * chip.clock * count * side**2 == pytest.approx(chip.peak, rel=0.01)
