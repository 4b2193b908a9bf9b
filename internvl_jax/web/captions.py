"""Captions: what the middleware writes about a picture, in several languages."""

import html
from collections.abc import Iterator, Mapping, Sequence

import gradio as gr
from PIL import Image

from internvl_jax.data import text
from internvl_jax.loading import Model
from internvl_jax.web import pictures
from internvl_jax.web.site import Site, notice, on


def describe(
    model: Model, picture: Image.Image, languages: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(language, caption), one after the other."""
    if not languages:
        raise ValueError("choose a language")
    for language in text.LANGUAGES:
        if language in languages:
            (caption,) = model.caption([picture], language)
            yield language, caption


def table(captions: Mapping[str, str]) -> str:
    """The captions as HTML that says which language each is in."""
    rows = "".join(
        f'<tr><th scope="row">{text.LANGUAGE_NAMES[language]}</th>'
        f'<td lang="{language}">{html.escape(caption)}</td></tr>'
        for language, caption in captions.items()
    )
    return f'<table class="captions"><caption>Captions</caption><tbody>{rows}</tbody></table>'


class Tab:
    """The tab's layout."""

    TITLE = "Captions"

    def __init__(self, site: Site):
        self._site, self._model = site, site.internvl
        self._first = ""  # what the page shows before a click

    def missing(self) -> str | None:
        """Why the tab cannot be served, or None."""
        reason = self._site.without_texts("Captioning")
        if reason is None and not self._model.config.num_queries:
            return "Captions need the middleware of an InternVL-G; this is an InternVL-C."
        return reason

    def warm(self, offered: Sequence[str]) -> None:
        """Compile what a click runs, by running it."""
        *_, (self._first,) = self._run(offered[0], text.LANGUAGES)

    def build(self, offered: Sequence[str]) -> None:
        """Lay the tab out."""
        gr.Markdown("The middleware describes the picture, by beam search over five beams.")
        with gr.Row():
            with gr.Column():
                picture = pictures.chooser(offered)
            with gr.Column():
                languages = gr.CheckboxGroup(
                    [(name, code) for code, name in text.LANGUAGE_NAMES.items()],
                    value=list(text.LANGUAGES),
                    label="Languages",
                )
                button = gr.Button("Describe", variant="primary")
                said = notice()
                result = gr.HTML(self._first, elem_id="captions")
        on(button.click, self._run, [picture, languages], [result], said)

    def _run(self, path: str | None, languages: Sequence[str]) -> Iterator[tuple[str]]:
        picture = pictures.read(path, self._site.limits)
        written = {}
        for language, caption in describe(self._model, picture, languages):
            written[language] = caption
            yield (table(written),)
