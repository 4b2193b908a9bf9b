"""The matcher: every path once, first rule first, and errors that name paths and rules."""

import pytest

from internvl_jax import rules

TREE = {"vit": {"a": 1, "b": {"c": 2}}, "llama": {"a": 3}}


def test_flatten_and_unflatten_are_inverse():
    flat = rules.flatten(TREE)
    assert flat == {"vit/a": 1, "vit/b/c": 2, "llama/a": 3}
    assert rules.unflatten(flat) == TREE


def test_first_matching_rule_wins():
    values = rules.match(rules.flatten(TREE), [("vit/b/.*", "x"), ("vit/.*", "y"), (".*", "z")])
    assert values == {"vit/a": "y", "vit/b/c": "x", "llama/a": "z"}


def test_paths_without_a_rule_and_rules_without_a_path_are_listed():
    with pytest.raises(rules.RuleError, match=r"1 parameter\(s\) match no learning rate: llama/a"):
        rules.match(rules.flatten(TREE), [("vit/.*", 1)], "learning rate")
    with pytest.raises(rules.RuleError, match=r"match no parameter of their own: vti/\.\*"):
        rules.match(rules.flatten(TREE), [("vti/.*", 1), (".*", 2)])


def test_partition_and_merge():
    trainable, frozen = rules.partition(TREE, "vit/.*")
    assert trainable == {"vit": {"a": 1, "b": {"c": 2}}}
    assert frozen == {"llama": {"a": 3}}
    assert rules.merge(trainable, frozen) == TREE
    with pytest.raises(rules.RuleError, match="the tree holds llama, vit"):
        rules.partition(TREE, "projector")
