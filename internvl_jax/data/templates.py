"""Chat templates of the InternVL releases: a conversation as one string.

The strings are those of the released programs, character for character; which model uses which
stands in its config.json ("template").
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Template:
    """Layout of a chat: the system message, then per round the user's and the assistant's turn.

    system: the message; opening: what stands at the start, with `{system}` for the message.
    user, assistant: text before each turn; between, end: text after the user's and after the
    assistant's turn. space: stands between `assistant` and an answer, but not in an open prompt.
    stop: a text that ends generation beside `end`, or None.
    """

    system: str
    opening: str
    user: str
    assistant: str
    between: str
    end: str
    space: str = ""
    stop: str | None = None

    def prompt(self, rounds: Sequence[tuple[str, str | None]]) -> str:
        """Renders rounds of (question, answer); a last answer of None asks for one."""
        result = self.start()
        for question, answer in rounds:
            result += self.question(question)
            if answer is not None:
                result += f"{self.space}{answer}{self.end}"
        return result

    def start(self) -> str:
        """The text before the first round."""
        return self.opening.replace("{system}", self.system)

    def question(self, text: str) -> str:
        """A user's turn, and the opening of the answer to it."""
        return f"{self.user}{text}{self.between}{self.assistant}"


def _colons(system: str, opening: str, user: str, assistant: str) -> Template:
    """`USER: question ASSISTANT: answer</s>`, as Vicuna has it."""
    return Template(system, opening, f"{user}: ", f"{assistant}:", " ", "</s>", space=" ")


def _marked(system: str, start: str, end: str, names: Sequence[str], stop=None) -> Template:
    """Turns between special tokens; `start` has {name} for who speaks."""
    first, user, assistant = (start.replace("{name}", name) for name in names)
    return Template(system, f"{first}{{system}}{end}", user, assistant, end, end, stop=stop)


_ROLES = ("system", "user", "assistant")
_CHATML = "<|im_start|>{name}\n"
_SHANGHAI = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)

VICUNA_V1 = _colons(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "{system} ",
    "USER",
    "ASSISTANT",
)
INTERNLM2 = _marked(_SHANGHAI, _CHATML, "<|im_end|>", _ROLES)
TEMPLATES: dict[str, Template | None] = {
    "vicuna_v1": VICUNA_V1,
    # The same turns without the system message: for small models with short contexts.
    "brief": dataclasses.replace(VICUNA_V1, system="", opening=""),
    "plain": None,
    "internlm": Template(
        system="A chat between a curious <|User|> and an <|Bot|>. The <|Bot|> gives helpful, "
        "detailed, and polite answers to the <|User|>'s questions.\n\n",
        opening="{system}",
        user="<s><|User|>:",
        assistant="<|Bot|>:",
        between="<eoh>\n",
        end="<eoa>\n",
    ),
    "internvl_zh": _colons("", "{system} ", "<human>", "<bot>"),
    "Hermes-2": dataclasses.replace(INTERNLM2, stop="<|endoftext|>"),
    "internlm2-chat": INTERNLM2,
    "phi3-chat": _marked(_SHANGHAI, "<|{name}|>\n", "<|end|>", _ROLES),
    "internvl2_5": _marked(_INTERNVL2_5, _CHATML, "<|im_end|>\n", _ROLES),
}
# Other names of the same.
TEMPLATES |= {"v1": VICUNA_V1, "vicuna_v1.1": VICUNA_V1}


def template(name: str) -> Template | None:
    """The named template; "plain" is None: image, caption and a line break, without turns."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
