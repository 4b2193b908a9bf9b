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
_FONTS = (fonts.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
THEME = gr.themes.Default(
    primary_hue=colors.blue,
    neutral_hue=colors.slate,
    font=_FONTS,
    font_mono=_FONTS,
).set(  # enough contrast for small text
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_label_text_color="*neutral_600",
    block_title_text_color="*neutral_700",
    input_placeholder_color="*neutral_600",
    input_placeholder_color_dark="*neutral_300",
)
CSS = """
button[role=tab][aria-selected=true] { color: var(--primary-700); }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300); }
.choices { gap: .5rem; } .choices button { flex: 0 1 auto; }
.captions { width: 100%; border-collapse: collapse; font-size: 1.1rem; }
.captions caption { text-align: left; padding-bottom: .5rem; }
.captions th, .captions td { text-align: left; padding: .5rem .8rem; }
.notice:not(:has(p)) { display: none; }
.notice p { border-left: 4px solid #b91c1c; padding: .4rem .8rem; font-weight: 700; margin: 0; }
"""


def warmed(site: Site, folder: str) -> tuple[list[Any], list[str]]:
    """The tabs with everything behind them compiled, and the pictures that they offer.

    folder: empty, for those pictures.
    """
    offered = pictures.examples(folder)
    gr.set_static_paths([folder])  # served from there, and never cleaned away
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
