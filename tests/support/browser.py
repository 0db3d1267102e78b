"""A real browser without a window: the Chromium that is installed, driven by playwright."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_A_MAC = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
REBOUND = "rebound.example"  # a name of a stranger's that leads to this machine
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
ARGUMENTS = (
    *QUIET,
    "--no-sandbox",
    "--disable-gpu",
    "--no-proxy-server",
    f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1",
)
PATIENCE_MS = 60_000  # as long as a loaded machine may take


def run_browser() -> Iterator[Browser]:
    """Start the browser, or skip where there is none; it ends with the iterator."""
    found = next(filter(None, map(shutil.which, (*NAMES, *ON_A_MAC))), None)
    if found is None:
        pytest.skip("no browser: Chromium is not installed (Debian: apt install chromium)")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser: Browser, url: str) -> Iterator[tuple[Page, list[str]]]:
    """Open a page in a context of its own; the list gets what its console says and what breaks in it."""
    with contextlib.closing(browser.new_context()) as opened:
        page, said = opened.new_page(), list[str]()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        yield page, said


@contextlib.contextmanager
def other_site() -> Iterator[int]:
    """Serve empty pages, under every name of this machine; gives the port."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b'<!doctype html><link rel="icon" href="data:,">')

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
