"""Chat templates that no recorded prompt covers, letter by letter."""

from dataclasses import replace

import pytest

from internvl_jax.data import templates

ROUNDS = [("Hi", "Yes."), ("Why?", None)]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        (
            "internvl2_5",
            "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "internlm",
            "SYS<s><|User|>:Hi<eoh>\n<|Bot|>:Yes.<eoa>\n<s><|User|>:Why?<eoh>\n<|Bot|>:",
        ),
        ("vicuna_v1.1", "SYS USER: Hi ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"),
    ],
)
def test_prompt(name, prompt):
    assert replace(templates.template(name), system="SYS").prompt(ROUNDS) == prompt


def test_empty_system_message_keeps_its_separator():
    assert templates.template("internvl_zh").prompt([("Hi", None)]) == " <human>: Hi <bot>:"
    assert templates.template("brief").prompt([("Hi", None)]) == "USER: Hi ASSISTANT:"
