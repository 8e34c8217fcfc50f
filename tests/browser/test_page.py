"""The page at `/` in a browser, as people use it: with the mouse, and with the keyboard alone.

`make test-page`: needs a Chromium on the machine (CHROMIUM names it), which no package index has.
"""

import io
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from serving import Running, generated, start

from kvweave import lab, models
from kvweave.serve.keys import Keys
from kvweave.serve.limits import Limits, Offers

KEY = "the-key-of-this-page"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = start(
        limits=Limits(rows=8, new_tokens=32), offers=Offers(["snapkv", "full", "flowmm"], 0.3), keys=Keys([KEY])
    )
    yield found
    found.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-headless-shell", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)))
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, running: Running) -> Iterator[Page]:
    """The page, a key typed; whatever the browser complains of fails the test."""
    found = browser.new_page()
    complaints: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text) if "Content Security" in said.text else None)
    found.goto(running.url)
    found.get_by_label("API key").fill(KEY)
    found.get_by_label("API key").blur()
    expect(found.get_by_label("Method").locator("option")).to_have_count(3)
    yield found
    found.close()
    assert complaints == []


def files(sample: Any) -> list[dict[str, Any]]:
    """A sample's pictures as files."""
    found = []
    for number, image in enumerate(sample.images, 1):
        raw = io.BytesIO()
        image.save(raw, "PNG")
        found.append({"name": f"{number}.png", "mimeType": "image/png", "buffer": raw.getvalue()})
    return found


def asked(sample: Any, question: str) -> Any:
    """What the page asks: pictures, then the question."""

    class Own:
        def messages(self) -> list[dict[str, Any]]:
            pictures = [{"type": "image", "image": image} for image in sample.images]
            return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]

    return Own()


def test_pictures_are_asked_about(page: Page) -> None:
    (sample,) = lab.samples("image_needle", 1, 3, 0)
    page.get_by_label("Images", exact=True).set_input_files(files(sample))
    expect(page.get_by_role("button", name="Remove")).to_have_count(3)
    question = "what digit is hidden in image #2 ?"
    page.get_by_label("Question").fill(question)
    page.get_by_label("Share of the prompt").fill("30")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("img", name="what is kept of image 3")).to_be_visible()
    text, _ = generated(models.load("lab"), asked(sample, question), "snapkv:budget=0.3", 32)
    expect(page.locator("#answer")).to_have_text(text)
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    saved = page.locator("#meter").evaluate("meter => meter.value")
    assert saved == pytest.approx(0.7, abs=0.01)
    expect(page.locator("#bytes")).to_contain_text("% saved")
    expect(page.locator("figcaption")).to_have_count(3)
    shades = page.locator("canvas").first.evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 5, 5).data].filter((_, n) => n % 4 === 3)"
    )
    assert len(shades) == 25
    assert len(set(shades)) > 1  # some cells are kept and some are not
    expect(page.locator("#words")).to_contain_text("question:")


def test_pictures_are_dropped_and_removed(page: Page) -> None:
    (sample,) = lab.samples("image_needle", 1, 2, 0)
    data = [list(file["buffer"]) for file in files(sample)]
    page.evaluate(
        """data => {
            const given = new DataTransfer();
            const file = (bytes, name, type) => given.items.add(new File([bytes], name, {type}));
            data.forEach((bytes, n) => file(new Uint8Array(bytes), n + ".png", "image/png"));
            file("x", "notes.txt", "text/plain");
            const drop = new DragEvent("drop", {dataTransfer: given, cancelable: true});
            document.getElementById("drop").dispatchEvent(drop);
        }""",
        data,
    )
    expect(page.get_by_role("button", name="Remove")).to_have_count(2)
    expect(page.get_by_role("alert")).to_contain_text("notes.txt is not allowed")
    page.get_by_role("button", name="Remove image 1, 0.png").click()
    expect(page.get_by_role("img", name="image 1: 1.png")).to_be_visible()


def test_the_keyboard_is_enough(page: Page) -> None:
    page.get_by_label("Question").focus()
    page.keyboard.type("where is the cat ?")
    for _ in range(4):  # past method, share and key to the button
        page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Ask")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#answer")).not_to_be_empty()


def test_what_is_refused_is_said(page: Page) -> None:
    page.get_by_label("Question").fill("cat " * 5000)
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("too many")
    page.get_by_label("API key").fill("no key at all")
    page.get_by_label("API key").blur()
    page.get_by_label("Question").fill("cat")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert")).to_contain_text("API key")


def test_an_answer_can_be_stopped(page: Page, running: Running) -> None:
    engine = running.server.engine
    emit, ends = engine._emit, running.server._ends
    import time

    engine._emit = lambda job, piece: time.sleep(0.2) or emit(job, piece)  # type: ignore[method-assign]
    running.server._ends = []
    try:
        page.get_by_label("Question").fill("where is the cat ?")
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#answer")).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()
        assert page.get_by_role("alert").text_content() == ""
    finally:
        engine._emit, running.server._ends = emit, ends  # type: ignore[method-assign]
