"""The page in a real browser, over a fake cluster; and what pages of other sites can't do, however they ask."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator

import httpx2
import pytest
from playwright.sync_api import Browser, expect

from tests.server.test_http import KEY, Site, expected, run_site, wait_until
from tests.support.browser import REBOUND, open_page, other_site, run_browser

CHAT = "/v1/chat/completions"
# Every way in which a page can send a body without asking first, then the ways for which a browser asks.
WAYS = """async ([url, key]) => {
  const body = JSON.stringify({messages: [{role: "user", content: "hello"}]}), told = {};
  const send = async (name, options) => {
    try {
      const reply = await fetch(url, {method: "POST", body, ...options});
      told[name] = reply.type === "opaque" ? "unreadable" : reply.status;
    } catch { told[name] = "blocked"; }
  };
  await send("text", {mode: "no-cors"});
  await send("no type", {mode: "no-cors", body: new Blob([body])});
  await send("form", {mode: "no-cors", headers: {"content-type": "application/x-www-form-urlencoded"}});
  await send("json unasked", {mode: "no-cors", headers: {"content-type": "application/json"}});
  navigator.sendBeacon(url, body);
  await send("json", {headers: {"content-type": "application/json", ...(key && {authorization: `Bearer ${key}`})}});
  return told;
}"""
UNASKED = {"text": "unreadable", "no type": "unreadable", "form": "unreadable", "json unasked": "unreadable"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from run_browser()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY)


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One without a key."""
    yield from run_site(tmp_path_factory.mktemp("open") / "run" / "s", None)


def test_the_page_needs_no_key_and_its_policy_names_its_own_script_and_style(site: Site) -> None:
    with httpx2.Client(base_url=site.url) as http:
        page = http.get("/")
        assert http.head("/").headers["content-length"] == str(len(page.content))
        assert http.get("/v1/models").status_code == http.get("/metrics").status_code == 401
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.split(" ", 1) for rule in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert policy[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not re.search(r"""(src|href|action)=(?!"data:,")|https?:|\bon\w+="|style=|innerHTML""", page.text)


def test_answers_errors_and_questions_are_text_and_stay_in_the_conversation(browser: Browser, open_site: Site) -> None:
    with open_page(browser, open_site.url) as (page, said):
        expect(page.locator("#model")).to_have_value("tiny")
        page.fill("#question", "ponder <img src=x onerror=alert(1)>")
        page.press("#question", "Enter")
        last = page.locator("article").last
        expect(last).to_contain_text("tokens/s, the first after 0.10 s.")
        expect(page.locator("article").first).to_contain_text("<img src=x onerror=alert(1)>")
        assert page.locator("article img").count() == 0
        assert last.locator("details p").text_content() == expected(3)
        answer = expected(20).removeprefix(expected(3))
        assert last.locator(":scope > p").first.text_content() == answer
        page.click("#clear")
        assert page.locator("article").count() == 0
        page.fill("#question", "lose")
        page.click("#send")
        expect(page.locator("article").last).to_contain_text("rank 1 was lost: connection reset (hint: moectl doctor)")
        page.fill("#question", "refuse")
        page.click("#send")
        expect(page.locator("article .error").last).to_contain_text("the model's context is 256")
        messages = open_site.cluster.requests[-1].messages or ()
        assert [message["content"] for message in messages] == ["lose", expected(3), "refuse"]
    assert said == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]


def test_an_answer_streams_until_it_is_stopped(browser: Browser, open_site: Site) -> None:
    with open_page(browser, open_site.url) as (page, said):
        cancelled = open_site.cluster.cancelled
        page.fill("#question", "endless")
        page.press("#question", "Shift+Enter")
        page.press("#question", "Enter")
        answer = page.locator("article").last
        expect(answer).to_contain_text("0:9 ")  # and it never ends by itself
        expect(page.get_by_role("status")).to_have_text("The answer is on its way.")
        expect(page.locator("#requests")).to_have_text("1 running, 0 waiting")
        expect(page.locator("#speed")).not_to_have_text("0.0 tokens/s")
        page.get_by_role("button", name="Stop").press("Enter")
        expect(answer).to_contain_text("You stopped this answer.")
        wait_until(lambda: open_site.cluster.cancelled == cancelled + 1)
        expect(page.get_by_label("Your message")).to_be_focused()
    assert said == []


STREAM = (
    ': moectl: rank 1 was lost. Starting again (1 of 3).\n\ndata: {"choices": [{"delta": {"content": "half an"}}]}\n\n'
)


def test_what_happens_to_the_server_is_told(browser: Browser, open_site: Site) -> None:
    with open_page(browser, open_site.url) as (page, _):
        expect(page.locator("#ranks")).to_have_text("2 of 2 answer")
        page.route(f"**{CHAT}", lambda route: route.fulfill(body=STREAM, content_type="text/event-stream"))
        notices = "new MutationObserver(() => told.push(notice.textContent)).observe(notice, {childList: true})"
        page.evaluate(f"() => {{ window.told = []; const notice = document.querySelector('#notice'); {notices}; }}")
        page.fill("#question", "hello")
        page.press("#question", "Enter")
        expect(page.locator("article").last).to_contain_text("half an")
        expect(page.locator("article .error")).to_have_text("The connection ended before the answer did. Ask again.")
        assert "rank 1 was lost. Starting again (1 of 3)." in page.evaluate("told")
        page.route("**/metrics", lambda route: route.abort())
        expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
        expect(page.locator("#ranks")).to_have_text("not known")
        page.unroute("**/metrics")
        expect(page.locator("#ranks")).to_have_text("2 of 2 answer")
        expect(page.get_by_role("alert")).to_be_empty()
        open_site.cluster.ranks_answered = 1
        expect(page.locator("#ranks.error")).to_have_text("1 of 2 answer")
        open_site.cluster.ranks_answered = 2


@pytest.mark.parametrize(("name", "lets_in"), [("localhost", True), ("evil.localhost", False)])
def test_pages_of_other_sites_can_only_ask_if_they_are_allowed(
    browser: Browser, site: Site, open_site: Site, name: str, lets_in: bool
) -> None:
    with other_site() as port, open_page(browser, f"http://{name}:{port}/") as (page, _):
        for one, key, status in ((open_site, "", 200), (site, KEY, 200), (site, "wrong", 401), (site, "", 401)):
            before = len(one.cluster.requests)
            told = page.evaluate(WAYS, [one.url + CHAT, key])
            assert told == {**UNASKED, "json": status if lets_in else "blocked"}
            assert len(one.cluster.requests) - before == (lets_in and status == 200)
    counts = httpx2.get(f"{open_site.url}/metrics").text
    refused = 415 if lets_in else 403
    assert f'path="{CHAT}",status="{refused}"}}' in counts  # they came, and the server refused them


def test_a_name_that_was_made_to_point_here_gets_no_page(browser: Browser, open_site: Site) -> None:
    port = open_site.url.rpartition(":")[2]
    with open_page(browser, f"http://{REBOUND}:{port}/") as (page, _):
        assert "forbidden_host" in (page.text_content("body") or "")


def test_no_other_page_can_frame_it(browser: Browser, open_site: Site) -> None:
    with other_site() as port, open_page(browser, f"http://localhost:{port}/") as (page, said):
        page.set_content(f'<iframe src="{open_site.url}/"></iframe>')
        page.wait_for_load_state()
        assert any("frame-ancestors" in text for text in said)
