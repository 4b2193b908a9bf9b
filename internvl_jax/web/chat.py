"""Chat: questions about pictures in several turns, the answers shown as they are written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from internvl_jax.data import questions, scenes, text
from internvl_jax.data.conversation import IMAGE_MARK
from internvl_jax.loading import Model
from internvl_jax.server.requests import Limits
from internvl_jax.web import pictures
from internvl_jax.web.site import Site, notice, on

MOST_CHARACTERS = 4000
_HOUR = 3600


@dataclass(frozen=True)
class Talk:
    """A conversation so far.

    rounds: of (question, answer) as `Model.chat_prompt` takes them. images: theirs, uint8
    [S, S, 3] in order. shown: the messages as Gradio's chat shows them.
    """

    rounds: tuple[tuple[str, str], ...] = ()
    images: tuple[np.ndarray, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()


def ask(
    model: Model, talk: Talk, question: str, images: Sequence[Image.Image], limits: Limits,
    files: Sequence[str] = (),
) -> Iterator[Talk]:  # fmt: skip
    """The conversation with a further question: first unanswered, then as the answer grows.

    files: the new images' paths, to be shown. Raises ValueError where a limit is met.
    """
    words = question.replace(IMAGE_MARK, "").strip()
    if not words and not images:
        raise ValueError("write a question")
    if len(words) > MOST_CHARACTERS:
        raise ValueError(f"a question has at most {MOST_CHARACTERS} characters")
    if len(talk.images) + len(images) > limits.images:
        raise ValueError(f"a conversation has at most {limits.images} pictures; start a new one")
    marked = f"{IMAGE_MARK}\n" * len(images) + words
    known = (*talk.images, *(pictures.pixels(model, picture)[0] for picture in images))
    rounds = [*talk.rounds, (marked, None)]
    length = len(model.chat_prompt(rounds))
    if length > limits.prompt_tokens:
        raise ValueError(
            f"the conversation has {length} tokens, pictures included; "
            f"{limits.prompt_tokens} are allowed: start a new one"
        )
    parts = [*map(_shown, files), *([words] if words else [])]
    shown = (*talk.shown, {"role": "user", "content": parts})
    yield replace(talk, images=known, shown=shown, rounds=(*talk.rounds, (marked, "")))
    answer = ""
    for piece in model.reply(rounds, known, max_new_tokens=limits.new_tokens):
        if piece:
            answer += piece
            yield Talk(
                (*talk.rounds, (marked, answer)),
                known,
                (*shown, {"role": "assistant", "content": answer}),
            )


def _shown(path: str) -> gr.Image:
    """A picture in the conversation; as a mere file it would have neither words nor quiet."""
    return gr.Image(
        path, alt_text="A picture of yours", buttons=[], show_label=False, interactive=False,
        height=180, render=False,
    )  # fmt: skip


class Tab:
    """The tab's layout."""

    TITLE = "Chat"

    def __init__(self, site: Site):
        self._site, self._model = site, site.chat

    def missing(self) -> str | None:
        """Why the tab cannot be served, or None."""
        if self._model is None:
            return "Chat needs a chat model; add --checkpoint=demo-chat or another one."
        if self._model.tokenizer is None:
            return (
                "Chat needs the tokenizer, and the checkpoint came without it: "
                "put its tokenizer.model beside the weights."
            )
        return None

    def warm(self, offered: Sequence[str]) -> None:
        """Compile what a click runs: a first question and a second, which is longer."""
        talk = Talk()
        for files in (offered[:1], []):
            *_, (_, talk, _) = self._run({"text": _questions()[0], "files": files}, talk)

    def build(self, offered: Sequence[str]) -> None:
        """Lay the tab out."""
        gr.Markdown("Ask about pictures, in several turns. Earlier turns are remembered.")
        talk = gr.State(Talk(), time_to_live=_HOUR)
        messages = gr.Chatbot(
            label="Conversation", height=380, buttons=[], allow_file_downloads=False,
            render_markdown=False, placeholder="Add a picture and ask about it.",
        )  # fmt: skip
        question = gr.MultimodalTextbox(
            label="Question", placeholder="Write a question; Enter sends it", file_count="multiple",
            file_types=[".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"], sources=["upload"],
            max_plain_text_length=MOST_CHARACTERS,
        )  # fmt: skip
        said = notice()
        with gr.Row():
            stop = gr.Button("Stop", size="md")
            again = gr.Button("New conversation", size="md")
        asked = zip(_questions(), offered, strict=True)
        pictures.buttons([(q, p, {"text": q, "files": [p]}) for q, p in asked], question)
        # An answer takes its time: it does not keep the other tabs waiting.
        running = on(
            question.submit, self._run, [question, talk], [messages, talk, question], said,
            concurrency_id="chat", show_progress="hidden",
        )  # fmt: skip
        stop.click(None, None, None, cancels=[running], api_visibility="private")
        for event in (again.click, messages.clear):
            event(
                lambda: ([], Talk(), None, ""), None, [messages, talk, question, said],
                cancels=[running], api_visibility="private",
            )  # fmt: skip

    def _run(self, message: dict[str, Any], talk: Talk) -> Iterator[tuple[list, Talk, Any]]:
        limits, files = self._site.limits, message["files"]
        images = [pictures.read(path, limits) for path in files]
        for number, step in enumerate(
            ask(self._model, talk, message["text"], images, limits, files)
        ):
            yield list(step.shown), step, None if number == 0 else gr.skip()


def _questions() -> list[str]:
    """A question about each of the pictures that the page offers, in turn of the languages."""
    asked = []
    for number, place in enumerate(pictures.EXAMPLES):
        language = text.LANGUAGES[number % len(text.LANGUAGES)]
        known = questions.about_scene(scenes.scene(*place).description, language)
        # The fourth and fifth ask for colour and shape of one object, or which of two is where; a
        # language that comes again asks the other.
        asked.append(known[3 + (number + number // len(text.LANGUAGES)) % 2][0])
    return asked
