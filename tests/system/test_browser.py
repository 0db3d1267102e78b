"""`moectl serve` and its page in a real browser: the ranks, an answer, a stop, a wrong key."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect

from tests.support.browser import open_page, run_browser
from tests.support.ring import process_env
from tests.support.running import wait_for, workers

KEY = "sesame"
SHOTS = os.environ.get("MOECTL_TEST_SHOTS", "")  # a directory for pictures of the page, for a person to look at
LOOKS: dict[str, ViewportSize] = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a server of two ranks that wants a key."""
    (tmp_path / "key").write_text(KEY)
    words = ("serve", "--local", "2", "--port", "0", "--api-key-file", str(tmp_path / "key"), "--json")
    process = subprocess.Popen(
        [sys.executable, "-m", "moectl", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=process_env(),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    yield json.loads(line)["url"].removesuffix("/v1")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    wait_for(lambda: not workers())


@pytest.fixture
def browser() -> Iterator[Browser]:
    yield from run_browser()


def test_the_page_shows_the_ranks_and_streams_an_answer(browser: Browser, served: str) -> None:
    with open_page(browser, served) as (page, said):
        expect(page.get_by_label("The key that")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("this is not the server's API key")
        page.get_by_label("The key that").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_label("Model")).to_have_value(re.compile("^moectl-demo"))
        expect(page.locator("#ranks")).to_have_text("2 of 2 answer")
        expect(page.locator("tbody tr")).to_have_text([re.compile(r"^0\d+ MB$"), re.compile(r"^1\d+ MB$")])
        expect(page.locator("#curl")).to_contain_text(f"curl {served}/v1/chat/completions")
        assert KEY not in page.content() + page.url
        page.reload()  # this tab keeps the key
        question = page.get_by_label("Your message")
        question.fill("What is expert parallelism?")
        expect(page.locator("#ranks")).to_have_text("2 of 2 answer")
        question.press("Enter")
        expect(page.locator(".hint").filter(has_text="the first after")).to_have_text(re.compile(r"^\d+ tokens, "))
        assert "expert" in (page.locator("article .text").last.text_content() or "")
        take_pictures(page)
        question.fill("Count. " * 400)  # long to read: there is time to stop it
        question.press("Enter")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("article").last).to_contain_text("You stopped this answer.")
        expect(page.locator("#requests")).to_have_text("0 running, 0 waiting")
        page.get_by_role("button", name="Forget the API key").click()
        expect(page.locator("#door")).to_be_visible()
        assert page.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    refused = "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    assert said == [refused] * 3  # without a key, with a wrong one, and when it was forgotten; nothing else


def take_pictures(page: Page) -> None:
    """Hold the page to the width of each look; keep pictures of it where they are wanted."""
    for name, size in LOOKS.items():
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], f"{name}: it scrolls sideways"
        if SHOTS:
            page.emulate_media(color_scheme="light")
            page.screenshot(path=Path(SHOTS, f"{name}-light.png"), full_page=True)
            page.emulate_media(color_scheme="dark")
            page.screenshot(path=Path(SHOTS, f"{name}-dark.png"), full_page=True)
