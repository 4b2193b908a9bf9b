"""What the tabs share: the models, the limits, and how a visitor's click reaches a function."""

import html
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from internvl_jax import loading
from internvl_jax.loading import Model
from internvl_jax.models import ChatConfig, InternVLConfig, LanguageModelConfig
from internvl_jax.server.requests import ApiError, Limits


@dataclass(frozen=True)
class Site:
    """The models behind the page: the first InternVL and the first chat model among those given.

    gallery: folder of the pictures to search in; None: the embedded scenes.
    """

    internvl: Model | None
    chat: Model | None
    limits: Limits
    gallery: str | None = None

    @classmethod
    def of(cls, models: Mapping[str, Model], limits: Limits, gallery: str | None = None) -> "Site":
        """Choose from models by name. ValueError for one that no tab would show."""
        found: dict[str, Model] = {}
        for name, model in models.items():
            if isinstance(model.config, LanguageModelConfig):
                raise ValueError(f"{name} is a language model: it has no pictures to show")
            kind = "chat" if isinstance(model.config, ChatConfig) else "internvl"
            if kind in found:
                raise ValueError(f"{name} is a second model of its kind; there is room for one")
            found[kind] = model
        return cls(found.get("internvl"), found.get("chat"), limits, gallery)

    def without_texts(self, what: str) -> str | None:
        """Why pictures cannot be compared with texts; None where they can."""
        if self.internvl is None or not isinstance(self.internvl.config, InternVLConfig):
            return f"{what} needs an InternVL-C or -G; add --checkpoint=demo or another one."
        if self.internvl.tokenizer is None:
            return (
                f"{what} needs the tokenizer, and the checkpoint came without it: "
                "put its tokenizer.model beside the weights."
            )
        return None


def text_length(model: Model) -> int:
    """Tokens that the text tower was trained on."""
    return model.experiment.get("data", {}).get("text_length", loading.TEXT_LENGTH)


def notice() -> gr.HTML:
    """A place in a tab for what `on` has to say; screen readers read it out."""
    return gr.HTML("", elem_classes="notice")


def on(
    event: Any, function: Callable, inputs: Any, outputs: Sequence[Any], said: gr.HTML, **more: Any
) -> Any:
    """Call `function`, which returns a tuple for `outputs`, when `event` happens.

    What it refuses (ValueError, ApiError) the visitor reads in `said`; other errors stay in the
    server's log. One call at a time reaches the device, whatever the tab, unless `more` says
    otherwise; the others wait in line.
    """
    more = {"concurrency_id": "device", "concurrency_limit": 1, "api_visibility": "private"} | more
    return event(_told(function, len(outputs)), inputs, [*outputs, said], **more)


def _told(function: Callable, count: int) -> Callable:
    def refusal(error: Exception) -> list[Any]:
        text = html.escape(str(error))
        words = f'<p role="alert">{text[:1].upper()}{text[1:]}.</p>'
        return [*(gr.skip() for _ in range(count)), words]

    def call(*arguments):
        try:
            return [*function(*arguments), ""]
        except (ValueError, ApiError) as error:
            return refusal(error)

    def steps(*arguments):
        try:
            for result in function(*arguments):
                yield [*result, ""]
        except (ValueError, ApiError) as error:
            yield refusal(error)

    return steps if inspect.isgeneratorfunction(function) else call
