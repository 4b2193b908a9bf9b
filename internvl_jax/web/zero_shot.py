"""Zero-shot classification: a visitor's picture among labels of the visitor's own."""

from collections.abc import Sequence

import gradio as gr
import numpy as np
from PIL import Image

from internvl_jax.data import conversation, text
from internvl_jax.evals import features, prompts, zero_shot
from internvl_jax.loading import Model
from internvl_jax.web import pictures
from internvl_jax.web.site import Site, notice, on, text_length

NAMES = {**text.LANGUAGE_NAMES, "ja": "Japanese", "ar": "Arabic", "it": "Italian"}
# "{c}" is the label. Those of the embedded data's languages are worded like its captions.
TEMPLATES = {
    **prompts.OWN,
    "en": ("{c}", "a photo of {c}", "there is {c} in the picture"),
    "zh": ("{c}", "{c}的照片", "图中有{c}"),
    "ko": ("{c}", "{c}의 사진"),
    "es": ("{c}", "una foto de {c}", "hay {c} en la imagen"),
}
_OFFERED = (
    ("red", "star"), ("orange", "star"), ("yellow", "star"), ("green", "square"), ("blue", "ring"),
    ("blue", "square"), ("purple", "circle"), ("black", "cross"),
)  # fmt: skip
LABELS = {
    language: tuple(text.noun(*pair, None, language) for pair in _OFFERED)
    for language in text.LANGUAGES
}
MOST_LABELS, MOST_TEMPLATES, MOST_CHARACTERS = 100, 20, 200
_BATCH = 32


def classify(
    model: Model, picture: Image.Image, labels: Sequence[str], templates: Sequence[str]
) -> dict[str, float]:
    """Label → probability, by the protocol of `evals.zero_shot`.

    labels, templates: the lines of a visitor. A template holds "{c}", the place of the label.
    Raises ValueError for too few, too many or too long ones.
    """
    labels, templates = _lines(labels), _lines(templates)
    if len(labels) < 2 or not templates:
        raise ValueError("give at least two labels and a template, each on a line of its own")
    if len(labels) > MOST_LABELS or len(templates) > MOST_TEMPLATES:
        raise ValueError(f"at most {MOST_LABELS} labels and {MOST_TEMPLATES} templates, please")
    if max(map(len, [*labels, *templates])) > MOST_CHARACTERS:
        raise ValueError(f"a line has at most {MOST_CHARACTERS} characters")
    if not all("{c}" in template for template in templates):
        raise ValueError("each template needs {c}, the place of the label")
    config, params = model.config, model.params
    wordings = [
        [conversation.clean_caption(t.replace("{c}", label)) for t in templates]
        for label in labels
    ]
    classes = zero_shot.class_embeddings(
        config, params, wordings, model.tokenizer, text_length(model), _BATCH
    )
    found = features.image_features(config, params, pictures.pixels(model, picture), "c", 1)
    logits = np.exp(float(params["logit_scale"])) * (classes @ found[0])
    shares = np.exp(logits - logits.max())
    return dict(zip(labels, (shares / shares.sum()).tolist(), strict=True))


def translated(labels: str, language: str) -> tuple[str, str]:
    """(labels, templates) for a language; labels that a visitor wrote stay as they are."""
    lines = tuple(_lines(labels.splitlines()))
    if lines in LABELS.values() and language in LABELS:
        labels = "\n".join(LABELS[language])
    return labels, "\n".join(TEMPLATES[language])


def _lines(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in texts if line.strip()))


class Tab:
    """The tab's layout."""

    TITLE = "Zero-shot"

    def __init__(self, site: Site):
        self._site, self._model = site, site.internvl
        self._first: dict[str, float] | None = None  # what the page shows before a click

    def missing(self) -> str | None:
        """Why the tab cannot be served, or None."""
        return self._site.without_texts("Zero-shot classification")

    def warm(self, offered: Sequence[str]) -> None:
        """Compile what a click runs, by running it."""
        (self._first,) = self._run(
            offered[0], "\n".join(LABELS["en"]), "\n".join(TEMPLATES["en"])
        )

    def build(self, offered: Sequence[str]) -> None:
        """Lay the tab out."""
        gr.Markdown("Which of your labels fits the picture? Any words will do, in any language.")
        with gr.Row():
            with gr.Column():
                picture = pictures.chooser(offered)
            with gr.Column():
                language = gr.Dropdown(
                    [(name, code) for code, name in NAMES.items()], value="en", label="Language",
                    info="Chooses the templates below.",
                )  # fmt: skip
                labels = gr.Textbox(
                    "\n".join(LABELS["en"]), lines=8, label="Labels", info="One on each line."
                )
                with gr.Accordion("Templates", open=False):
                    templates = gr.Textbox(
                        "\n".join(TEMPLATES["en"]), lines=3, label="Templates, one on each line",
                        info="Each label is put in place of {c}; the results are averaged.",
                    )  # fmt: skip
                button = gr.Button("Classify", variant="primary")
                said = notice()
                result = gr.Label(self._first, label="Probabilities", num_top_classes=8)
        on(language.change, translated, [labels, language], [labels, templates], said)
        on(button.click, self._run, [picture, labels, templates], [result], said)

    def _run(self, path: str | None, labels: str, templates: str) -> tuple[dict[str, float]]:
        picture = pictures.read(path, self._site.limits)
        return (classify(self._model, picture, labels.splitlines(), templates.splitlines()),)
