"""The page in a real browser: Debian's chromium, driven by playwright, and axe-core in it."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import axe_playwright_python
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from internvl_jax.data import scenes
from internvl_jax.web.page import TABS
from tests.compiling import XLA_FLAGS

pytestmark = pytest.mark.slow
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
ROOT = Path(__file__).parents[2]
SECONDS = 60_000  # milliseconds for an answer, on a busy machine too


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where `internvl-jax web --checkpoint=demo` listens."""
    command = [sys.executable, "-m", "internvl_jax.cli", "web", "--checkpoint=demo", "--port=0"]
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS}
    environment["TMPDIR"] = str(folder)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("open "):
                break
        assert lines and lines[-1].startswith("open "), lines
        prepared = [line.split(" …")[0] for line in lines if " …" in line]
        assert prepared == [f"preparing {tab.TITLE.lower()}" for tab in TABS]
        yield lines[-1].split()[1]
        server.terminate()
        assert server.wait() == 143
    assert not list(folder.glob("internvl-web-*"))  # uploads do not stay behind


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "the browser is missing: apt-get install chromium"
    expect.set_options(timeout=SECONDS)
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, as whom continuous integration runs.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The page, opened anew; it may ask nobody but the server for anything."""
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    asked, failed = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("response", lambda r: failed.append(r.url) if r.status >= 400 else None)
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(address)
    yield opened
    context.close()
    web = [urlsplit(url).netloc for url in asked if url.startswith("http")]
    assert set(web) == {urlsplit(address).netloc}
    assert not failed


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of one's own: a held-out scene that the page does not offer, a green square."""
    path = tmp_path_factory.mktemp("picture") / "mine.png"
    Image.fromarray(scenes.render([scenes.scene("test_single", 16)], 200)[0]).save(path)
    assert scenes.scene("test_single", 16).objects[0].color == "green"
    return path


def tab(page, name):
    """Open a tab and return it."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def upload(panel, path):
    """Take the picture away, as a visitor does, and give another."""
    panel.get_by_role("button", name="Clear").or_(
        panel.get_by_role("button", name="Remove Image")
    ).first.click()
    panel.locator("input[type=file]").first.set_input_files(path)
    expect(panel.get_by_alt_text("The picture that you chose")).to_be_visible()


def accessible(page, where):
    """No serious or critical finding of axe-core."""
    # Colours that are about to change would be judged half-way.
    page.wait_for_function("!document.getAnimations().some(a => a instanceof CSSTransition)")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    findings = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    found = {
        finding["id"]: [node["html"][:200] for node in finding["nodes"]]
        for finding in findings
        if finding["impact"] in ("serious", "critical")
    }
    assert not found, f"{where}: {json.dumps(found, indent=1)}"


def test_zero_shot(page, picture):
    panel = tab(page, "Zero-shot")
    accessible(page, "before a click")
    upload(panel, picture)
    labels = panel.get_by_label("Labels")
    labels.fill("a red star\na green square\na blue ring")
    panel.get_by_role("button", name="Classify").click()
    expect(panel.get_by_test_id("label-output-value")).to_have_text("a green square")
    accessible(page, "after it")
    labels.fill("one")
    panel.get_by_role("button", name="Classify").click()
    expect(panel.get_by_role("alert")).to_contain_text("two labels")
    accessible(page, "with a refusal")


def test_another_language_by_keyboard_alone(page):
    panel = tab(page, "Zero-shot")
    panel.get_by_label("Language").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Spanish")
    page.keyboard.press("Enter")
    panel.get_by_role("button", name="Templates").press("Enter")
    templates = panel.get_by_label("Templates, one on each line")
    expect(templates).to_have_value(re.compile("una foto de"))
    expect(panel.get_by_label("Labels")).to_have_value(re.compile("^una estrella roja"))
    panel.get_by_role("button", name="Classify").focus()
    page.keyboard.press("Enter")
    expect(panel.get_by_test_id("label-output-value")).to_have_text("una estrella roja")


def test_retrieval(page):
    panel = tab(page, "Retrieval")
    expect(panel.locator("img").first).to_be_visible()
    panel.get_by_label("What are you looking for?").fill("a large purple star")
    panel.get_by_label("What are you looking for?").press("Enter")
    first = panel.get_by_alt_text(re.compile(r"^1\. ")).first
    expect(first).to_have_attribute("alt", re.compile("purple star"))
    panel.get_by_role("button", name="un triángulo negro").click()
    panel.get_by_role("button", name="Search").click()
    expect(first).not_to_have_attribute("alt", re.compile("purple star"))
    accessible(page, "retrieval")


def test_captions_in_several_languages(page, picture):
    panel = tab(page, "Captions")
    upload(panel, picture)
    panel.get_by_label("Korean").uncheck()
    panel.get_by_role("button", name="Describe").click()
    expect(panel.locator("td[lang=en]")).to_contain_text("green square")
    expect(panel.locator("td[lang=zh]")).to_contain_text("绿色")
    expect(panel.locator("td[lang=es]")).to_contain_text("verde")
    expect(panel.locator("td[lang=ko]")).to_have_count(0)
    accessible(page, "captions")


def test_chat_streams_its_answers_in_several_turns(page, picture):
    panel = tab(page, "Chat")
    accessible(page, "before a question")
    # What the last answer looks like whenever the page changes.
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const shown = document.querySelectorAll('.bot.message');
                const text = shown.length ? shown[shown.length - 1].textContent.trim() : '';
                if (window.seen.at(-1) !== text) window.seen.push(text);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    question = panel.get_by_role("textbox", name="Question")
    panel.locator("input[type=file]").first.set_input_files(picture)
    question.fill("is there a green square? what color is the object?")
    expect(panel.locator(".thumbnail-item")).to_have_count(1)
    question.press("Enter")
    answers = panel.locator(".bot.message")
    expect(answers.last).to_contain_text(re.compile("green|yes"))
    question.fill("what shape is the object?")
    question.press("Enter")
    expect(answers).to_have_count(2)
    expect(answers.last).to_contain_text(re.compile(r"\w"))
    assert panel.locator(".user.message img").count() == 1
    accessible(page, "in a conversation")
    panel.get_by_role("button", name="Stop").click()
    panel.get_by_role("button", name="New conversation").click()
    expect(answers).to_have_count(0)
    # An answer of several words: what is below in a picture of two objects.
    panel.get_by_role("button", name="¿qué hay abajo?").click()
    expect(panel.locator(".thumbnail-item")).to_have_count(1)
    question.press("Enter")
    expect(answers.last).to_contain_text(re.compile(r"\w \w"))
    seen = page.evaluate("window.seen")
    assert any(
        first and second.startswith(first) and len(second) > len(first)
        for first, second in itertools.pairwise(seen)
    ), seen


def test_attention(page, picture):
    panel = tab(page, "Attention")
    upload(panel, picture)
    shown = panel.get_by_alt_text(re.compile("The picture in grey"))
    before = shown.get_attribute("src")
    panel.get_by_role("button", name="Show attention").click()
    expect(shown).not_to_have_attribute("src", before)
    words = panel.locator("#attention-words")
    first = words.inner_text()
    panel.get_by_role("slider", name=re.compile("Query")).focus()
    page.keyboard.press("ArrowRight")
    expect(words).not_to_have_text(first)
    panel.get_by_label("Class token").check()
    expect(panel.get_by_role("slider", name=re.compile("Head"))).to_be_visible()
    expect(words).to_contain_text("of the attention")
    accessible(page, "attention")
