# SPDX-License-Identifier: Apache-2.0
"""The page at /, in a real browser: by mouse, by keyboard, on a phone.

Chromium must be installed, as `apt-get install chromium` does; SLORA_SCREENSHOTS names a directory
for pictures.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, server) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    page.goto(server.url)
    expect(page.locator("#chips button").first).to_be_visible()
    yield page
    page.close()
    refused = "Failed to load resource: the server responded with a status of 404"
    assert not [one for one in complaints if not one.startswith(refused)]
    assert all(url.startswith(server.url) for url in outside), "it needs something from elsewhere"


def keep_picture(page: Page, name: str) -> None:
    if directory := os.environ.get("SLORA_SCREENSHOTS"):
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def test_ask_an_adapter_and_see_the_pool_move(page):
    expect(page.locator("#state")).to_have_text(re.compile("ready"))
    page.locator("#chips").get_by_text("stars", exact=True).click()
    page.locator("#prompt").fill("hello reader")
    page.locator("#send").click()
    expect(page.locator("#answer")).to_have_text(re.compile(r".+"), timeout=20_000)
    expect(page.locator("#measured")).to_have_text(re.compile("first token after .* tokens in"))
    text = page.locator("#answer").text_content()
    expect(page.locator("#legend")).to_contain_text("stars")
    label = page.locator("#pool").get_attribute("aria-label")
    assert re.search(r"The page pool of 1023 pages: .*stars \d+", label)

    page.locator("#chat").check()
    page.locator("#send").click()
    expect(page.locator("#answer")).to_have_text(text, timeout=20_000)


def test_running_requests_show(page, server):
    page.locator("#model").fill("upper")
    page.locator("#prompt").fill("a b c " * 10)
    page.locator("#max-tokens").fill("150")
    page.locator("#temperature").fill("2")
    for _ in range(3):
        page.locator("#send").click()
        expect(page.locator("#stop")).to_be_enabled()
        page.locator("#stop").click()
        expect(page.locator("#measured")).to_have_text(re.compile("stopped|tokens in"))
    server.wait_for(lambda: server.status()["running"] == 0)
    expect(page.locator("#running")).to_have_text("0")


def test_an_error_is_shown(page):
    page.locator("#model").fill("nobody")
    page.locator("#send").click()
    expect(page.locator("#answer")).to_have_text("The model `nobody` does not exist.")
    expect(page.locator("#answer")).to_have_class("error")


def test_with_the_keyboard(page):
    page.locator("#model").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("rot13")
    for _ in range(100):  # as many stops as there are adapters before the prompt
        page.keyboard.press("Tab")
        if page.locator("#prompt").evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Control+A")
    page.keyboard.type("hello")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_have_text("uryyb", timeout=20_000)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "light")])
def test_fits_the_screen(page, server, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    for name in ("leet", "title", "upper"):
        body = {"model": name, "prompt": "hello reader", "temperature": 0}
        server.post("/v1/completions", body)
    page.locator("#chips").get_by_text("rot13", exact=True).click()
    page.locator("#send").click()
    expect(page.locator("#answer")).to_have_text("uryyb ernqre", timeout=20_000)
    expect(page.locator("#legend")).to_contain_text("rot13")
    overflow = page.locator("html").evaluate("e => e.scrollWidth - e.clientWidth")
    assert overflow <= 0
    keep_picture(page, f"page-{width}-{scheme}")


def test_a_key_is_asked_for(browser, server):
    """The fields that a server with keys needs are there once it refuses."""
    page = browser.new_page()
    page.route("**/status", lambda route: route.fulfill(
        status=401, content_type="application/json",
        body='{"error": {"message": "send a key"}}'))  # fmt: skip
    page.goto(server.url)
    expect(page.locator("#key-row")).to_be_visible()
    expect(page.locator("#state")).to_have_text("send a key")
    page.close()
