"""Experiment configs: names, overrides, errors, and the recipes against the real models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from internvl_jax import configuration, models, rules
from internvl_jax.configuration import ConfigError
from internvl_jax.train import optimizer

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = [
    "language",
    "stage1_contrastive",
    "stage1_contrastive:224",
    "stage2_generative",
    "stage3_sft",
    "stage3_sft:projector",
    "stage3_sft:qllama",
    "stage3_sft:projector,qllama",
    "finetune_retrieval",
    "finetune_retrieval:lora",
]
TINY = [f"{name},tiny" if ":" in name else f"{name}:tiny" for name in VARIANTS]
DEMO = [f"demo:{stage}" for stage in configuration.load_module("demo").STAGES]


def flat(config) -> dict:
    return {path.replace("/", "."): leaf for path, leaf in rules.flatten(config.to_dict()).items()}


@pytest.mark.parametrize("name", VARIANTS + TINY + DEMO)
def test_every_config_builds_and_its_rules_fit_the_real_parameters(name):
    config = configuration.load(name)
    assert len(flat(config)) <= 60
    assert max(key.count(".") for key in flat(config)) <= 2
    params = models.abstract(models.from_dict(config.model))
    trainable, _ = rules.partition(params, config.trainable)
    # Raises where a rule matches nothing or a parameter has no rule.
    optimizer.make_optimizer(
        config.optimizer, trainable, steps=config.steps, all_params=params
    )


def test_shipped_configs_are_all_tested_here():
    assert {name.split(":")[0] for name in VARIANTS + DEMO} == set(configuration.names())


def test_stage_recipes_hold_the_published_constants():
    """arXiv 2312.14238, Tables 20 and 21."""
    first, second, tuned = (
        configuration.load(name)
        for name in ("stage1_contrastive", "stage2_generative", "finetune_retrieval")
    )
    assert [peak for _, peak in first.optimizer.learning_rate] == [1e-3, 1e-4]
    assert (first.optimizer.b1, first.optimizer.b2) == (0.9, 0.95)
    assert (first.optimizer.weight_decay, first.optimizer.warmup_steps) == (0.1, 5000)
    assert (first.model.drop_path, first.model.drop_path_schedule) == (0.2, "uniform")
    assert first.objective_options.mask_ratio == 0.5 and first.data.image_size == 196
    steps_224 = configuration.load("stage1_contrastive:224").steps
    assert first.steps + steps_224 == 175_000
    assert steps_224 * first.batch_size == pytest.approx(0.5e9, rel=1e-3)
    assert second.optimizer.b2 == 0.98 and second.optimizer.weight_decay == 0.05
    assert second.optimizer.learning_rate == ((".*", 5e-5),) and second.steps == 80_000
    assert tuned.optimizer.layer_decay == (("vit", 0.9), ("llama", 0.9))
    assert (tuned.data.image_size, tuned.batch_size) == (364, 1024)


def test_stage_two_trains_the_middleware_and_no_tower():
    config = configuration.load("stage2_generative")
    params = models.abstract(models.from_dict(config.model))
    trainable, frozen = rules.partition(params, config.trainable)
    assert set(trainable) == {"queries", "cross", "pool2", "match_head", "logit_scale"}
    assert set(frozen) == {"vit", "llama", "pool", "text_projection"}
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert count == pytest.approx(1.0e9, rel=0.15)  # "1B" of Table 20


def test_a_path_and_a_bare_name_give_the_same_config():
    by_path = configuration.load(str(ROOT / "configs" / "stage2_generative.py") + ":tiny")
    assert by_path.to_dict() == configuration.load("stage2_generative:tiny").to_dict()


def test_a_config_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from internvl_jax.configs import stage1_contrastive\n"
        "def get_config(arg=''):\n"
        "    config = stage1_contrastive.get_config(arg)\n"
        "    config.batch_size = 24\n"
        "    return config\n"
    )
    assert configuration.load(f"{file}:tiny").batch_size == 24


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("batch_size", "1_024", 1024),
        ("optimizer.weight_decay", "1e-2", 0.01),
        ("optimizer.learning_rate", "((r'vit/.*', 1e-3), ('.*', 1e-4))",
         (("vit/.*", 1e-3), (".*", 1e-4))),
        ("data.languages", "en,zh", ("en", "zh")),
        ("data.languages", "en", ("en",)),
        ("trainable", "llama/.*", "llama/.*"),
        ("model.drop_path", "0.1", 0.1),
        ("model.layer_scale", "0.5", 0.5),  # a field of the model that the config does not list
        ("init_from", "runs/a", ({"path": "runs/a"},)),
        ("init_from", "", ()),
    ],
)
def test_override(key, text, value):
    config = configuration.load("stage1_contrastive:tiny", [(key, text)])
    assert flat(config)[key] == value and type(flat(config)[key]) is type(value)


def test_new_paths_of_init_from_keep_the_renames():
    config = configuration.load("stage3_sft:projector", [("init_from", "a,b")])
    assert [entry["path"] for entry in config.init_from] == ["a", "b"]
    assert config.init_from[0]["rename"] == ((r"llama/(.*)", r"llm/\1"),)


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("stage1", [], ["stage1", "stage1_contrastive"]),
        ("configs/stage1_contrastiv.py", [], ["does not exist", "stage1_contrastive"]),
        ("stage1_contrastive:tony", [], ["tony", "tiny"]),
        ("language:tiny", [("warmup_steps", "1")], ["warmup_steps", "optimizer.warmup_steps"]),
        ("language:tiny", [("optimizer.wight_decay", "1")], ["optimizer.weight_decay"]),
        ("language:tiny", [("model.widht", "1")], ["model.widht", "model.width"]),
        ("language:tiny", [("optimizer", "1")], ["group", "optimizer.b1"]),
        ("language:tiny", [("steps", "many")], ["steps", "'many'"]),
        ("language:tiny", [("steps", "0")], ["steps", "at least 1"]),
        ("language:tiny", [("objective", "languag")], ["languag", "language"]),
        ("language:tiny", [("model.size", "tinny")], ["tinny", "tiny"]),
        ("language:tiny", [("data.task", "languages")], ["languages", "language"]),
        ("language:tiny", [("data.sources", "(('scene', 1.0),)")], ["scene", "scenes"]),
        ("language:tiny", [("data.languages", "en,kr")], ["kr", "ko"]),
    ],
)
def test_errors_are_one_line_with_the_nearest_names(name, overrides, words):
    with pytest.raises(ConfigError) as caught:
        configuration.load(name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_loaded_config_is_locked_and_survives_json():
    config = configuration.load("stage1_contrastive:tiny")
    with pytest.raises(AttributeError):
        config.bach_size = 3
    assert json.loads(configuration.to_json(config)) == configuration.to_dict(config)


def test_configs_are_found_without_an_installation(tmp_path):
    """From a checkout on the path alone, in another folder, as on a borrowed machine."""
    code = "from internvl_jax import configuration as c; print(*c.names())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True, text=True, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == configuration.names()


def test_regexes_of_every_config_are_whole_paths():
    for name in VARIANTS:
        config = configuration.load(name)
        for regex, _ in config.optimizer.learning_rate:
            re.compile(regex)
            assert not regex.startswith("^"), "rules match whole paths"
