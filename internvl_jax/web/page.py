"""The page: its tabs, its colours, and the first compilation of everything behind it."""

import time
from typing import Any

import gradio as gr
from gradio.themes.utils import colors, fonts

from internvl_jax.web import attention, captions, chat, pictures, retrieval, zero_shot
from internvl_jax.web.site import Site

TABS = (zero_shot.Tab, retrieval.Tab, captions.Tab, chat.Tab, attention.Tab)
_CLEANING = (600, 3600)  # seconds: how often, and of what age uploads are deleted

# Fonts come with Gradio or with the visitor's system: nothing is fetched from elsewhere.
THEME = gr.themes.Default(
    primary_hue=colors.blue,
    neutral_hue=colors.slate,
    font=(fonts.LocalFont("Source Sans Pro"), "system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
)
CSS = """
.captions { width: 100%; border-collapse: collapse; font-size: 1.1rem; }
.captions caption { text-align: left; padding-bottom: .5rem; }
.captions th, .captions td { text-align: left; padding: .4rem .8rem .4rem 0; }
"""


def warmed(site: Site) -> tuple[list[Any], list[str]]:
    """The tabs with everything behind them compiled, and the pictures that they offer."""
    offered = pictures.examples()
    tabs = [tab(site) for tab in TABS]
    for tab in tabs:
        if tab.missing() is None:
            start = time.monotonic()
            print(f"preparing {tab.TITLE.lower()} …", end=" ", flush=True)
            tab.warm(offered)
            print(f"{time.monotonic() - start:.0f} s", flush=True)
    return tabs, offered


def build(tabs: list[Any], offered: list[str]) -> gr.Blocks:
    """The page. A tab that the models cannot serve says why."""
    with gr.Blocks(title="InternVL", analytics_enabled=False, delete_cache=_CLEANING) as page:
        gr.Markdown("# InternVL\nPictures and words, by a model in JAX.")
        with gr.Tabs():
            for tab in tabs:
                with gr.Tab(tab.TITLE):
                    reason = tab.missing()
                    if reason is None:
                        tab.build(offered)
                    else:
                        gr.Markdown(f"**This model cannot do that.** {reason}")
    return page
