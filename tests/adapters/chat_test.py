"""lmms-eval's and VLMEvalKit's interfaces on the demo chat model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import internvl_jax
from internvl_jax.adapters.chat import Chat
from internvl_jax.data import scenes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def picture():
    number = next(i for i in range(99) if len(scenes.scene("test", i).objects) == 1)
    return Image.fromarray(scenes.render([scenes.scene("test", number)])[0])


def test_likelihoods_are_sums_and_know_the_greedy_answer(picture):
    chat = Chat("demo-chat")
    question = "what color is the object?"
    answer = chat.answer(question, [picture], max_new_tokens=8)
    assert answer in scenes.COLORS
    assert answer == chat.model.chat(np.asarray(picture), question)
    best, greedy = chat.likelihood(question, answer, [picture])
    assert greedy and best > np.log(0.2)
    for color in set(scenes.COLORS) - {answer}:
        value, greedy = chat.likelihood(question, color, [picture])
        assert value < best and not greedy
    assert chat.answer(question, [picture], until=[answer[1:]]) == answer[0]


def test_a_contrastive_model_is_refused():
    with pytest.raises(internvl_jax.loading.LoadError, match="demo is not a chat checkpoint"):
        Chat("demo")


@pytest.mark.slow
def test_lmms_eval_finds_the_model_by_its_entry_point_and_asks_it(picture):
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    model = registry.get_model_class("internvl_jax").create_from_arg_string("pretrained=demo-chat")
    document = {"picture": picture, "answer": "red"}
    model.task_dict = {"colors": {"test": {0: document}}}
    visual = lambda doc: [doc["picture"]]  # noqa: E731

    def ask(kind, *arguments):
        return Instance(
            request_type=kind, arguments=(*arguments, visual, 0, "colors", "test"), idx=0,
            metadata={"task": "colors", "doc_id": 0, "repeats": 1},
        )  # fmt: skip

    question = "what color is the object?"
    settings = {"max_new_tokens": 8, "until": ["\n"]}
    (answer,) = model.generate_until([ask("generate_until", question, settings)])
    assert answer in scenes.COLORS
    likelihoods = model.loglikelihood(
        [ask("loglikelihood", question, answer),
         ask("loglikelihood", question, lambda doc: "two circles")]
    )  # fmt: skip
    assert likelihoods[0][1] and likelihoods[0][0] > likelihoods[1][0]
    with pytest.raises(ValueError, match="unknown model_args: modle"):
        registry.get_model_class("internvl_jax")("demo-chat", modle=1)


# What VLMEvalKit's base class publishes: `generate` checks a message and calls `generate_inner`.
BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def use_custom_prompt(self, dataset):
        return False

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)
"""


def test_a_model_of_vlmevalkit_answers_its_messages(tmp_path, picture):
    """The kit is not on the package index: its published interface stands in, in a new process."""
    (tmp_path / "vlmeval" / "vlm").mkdir(parents=True)
    for name, text in (("__init__", ""), ("config", "supported_VLM = {}"), ("vlm/__init__", ""),
                       ("vlm/base", BASE)):  # fmt: skip
        (tmp_path / "vlmeval" / f"{name}.py").write_text(text)
    picture.save(tmp_path / "a.png")
    code = f"""if True:
        from internvl_jax.adapters import vlmeval
        from vlmeval.config import supported_VLM
        vlmeval.register("ours", "demo-chat", max_new_tokens=8)
        message = [dict(type="image", value={str(tmp_path / "a.png")!r}),
                   dict(type="text", value="what color is the object?")]
        print(supported_VLM["ours"]().generate(message, dataset="MMBench"))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in scenes.COLORS
