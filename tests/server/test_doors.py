"""Pages of other origins (CORS) and further names of the server: what the flags let in, and what stays out."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import pytest

from moectl.errors import UsageError
from moectl.server import visitors
from moectl.server.http import CHAT, make_app
from tests.server.test_http import KEY, Site, run_site, say
from tests.server.test_refusals import ask as post
from tests.support.fake_cluster import FakeCluster

PAGE, OTHER = "http://localhost:3000", "http://evil.example"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-api-key,x-stainless-lang",
}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    yield from run_site(tmp_path_factory.mktemp("site") / "run" / "s", KEY, origins=(PAGE, "app://x"))


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One without a key."""
    directory = tmp_path_factory.mktemp("open") / "run"
    yield from run_site(directory / "s", None, origins=(PAGE,), hosts=("host.docker.internal", "moe"))


@pytest.fixture(scope="module")
def any_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One for all origins."""
    yield from run_site(tmp_path_factory.mktemp("any") / "run" / "s", KEY, origins=("*",))


@pytest.fixture(scope="module")
def shut_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One without the flag: for pages of this machine."""
    yield from run_site(tmp_path_factory.mktemp("shut") / "run" / "s", KEY)


def ask(site: Site, method: str, path: str, **headers: str) -> httpx2.Response:
    with httpx2.Client(base_url=site.url) as http:
        return http.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/tiny", "/v1/x"])
def test_a_preflight_needs_no_key(site: Site, path: str) -> None:
    reply = ask(site, "OPTIONS", path, origin=PAGE, **PREFLIGHT)
    assert reply.status_code == 200
    assert reply.headers[ALLOWED] == PAGE
    assert "Origin" in reply.headers["vary"]
    allowed = reply.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")
    assert set(PREFLIGHT["access-control-request-headers"].split(",")) <= set(allowed)
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in reply.headers


def test_a_page_reads_every_reply(site: Site) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=site.url, headers={"origin": PAGE}) as http:

        def post(text: str, **more: object) -> httpx2.Response:
            return http.post("/v1/chat/completions", json={"messages": say(text), **more}, headers=key)

        replies = [
            http.get("/health"),
            http.get("/v1/models", headers=key),
            http.get("/v1/models"),  # 401
            http.get("/v2", headers=key),
            http.get("/v1/chat/completions", headers=key),
            http.post("/v1/chat/completions", content=b"{", headers={**key, "content-type": "application/json"}),
            post("hello"),
            post("hello", stream=True),
            post("lose", stream=True),
            post("refuse", stream=True),
            post("full"),
            post("bug"),
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 401, 404, 405, 400, 200, 200, 200, 400, 429, 500]
    for reply in replies:
        assert reply.headers.get_list(ALLOWED) == [PAGE]
        assert "Origin" in reply.headers["vary"]
    assert "retry-after" in replies[-2].headers["access-control-expose-headers"]


def test_another_page_is_told_the_flag(site: Site, shut_site: Site) -> None:
    local = ("http://localhost:30000", "https://localhost:3000")
    for where, origins in ((site, (OTHER, "null", *local)), (shut_site, (OTHER, "null", "http://evil.localhost"))):
        for origin in origins:
            reply = ask(where, "OPTIONS", "/v1/models", origin=origin, **PREFLIGHT)
            assert reply.status_code == 403
            assert ALLOWED not in reply.headers
            assert reply.json()["error"]["code"] == "forbidden_origin"
            hint = reply.json()["error"]["hint"]
            assert f"--allow-origin {origin}" in hint
            # What it says is enough to be let in.
            assert visitors.read_origins([origin], has_key="--api-key-file FILE" in hint) == (origin,)
        known = ask(where, "GET", "/v1/models", origin=OTHER, authorization=f"Bearer {KEY}")
        assert known.status_code == 200  # no browser's doing: those asked before
        assert ALLOWED not in known.headers


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000", "https://localhost", "http://127.0.0.1:5173", "http://[::1]:80"]
)
def test_without_the_flag_pages_of_this_machine_may_ask(shut_site: Site, origin: str) -> None:
    preflight = ask(shut_site, "OPTIONS", "/v1/chat/completions", origin=origin, **PREFLIGHT)
    assert (preflight.status_code, preflight.headers[ALLOWED]) == (200, origin)
    for key, status in ((KEY, 200), ("wrong", 401)):  # they need the key as well
        reply = ask(shut_site, "GET", "/v1/models", origin=origin, authorization=f"Bearer {key}")
        assert (reply.status_code, reply.headers[ALLOWED], reply.headers["vary"]) == (status, origin, "Origin")


@pytest.mark.parametrize(
    "origin",
    ["http://localhost.evil.example", "http://evil.localhost", "http://127.0.0.1.evil.example", "http://localhost:",
     "http://127.0.0.2", "ftp://localhost", "http://evil@localhost", "http://0.0.0.0", "app://localhost", "null", ""],
)  # fmt: skip
def test_what_only_looks_like_this_machine_is_another_page(shut_site: Site, origin: str) -> None:
    reply = ask(shut_site, "OPTIONS", "/v1/models", origin=origin, **PREFLIGHT)
    assert (reply.status_code, ALLOWED in reply.headers) == (403, False)


def test_all_origins(any_site: Site) -> None:
    for origin in (OTHER, "null", "vscode-webview://1a2b"):
        assert ask(any_site, "OPTIONS", "/v1/models", origin=origin, **PREFLIGHT).headers[ALLOWED] == "*"
        assert ask(any_site, "GET", "/v1/models", origin=origin).headers[ALLOWED] == "*"
    assert ask(any_site, "GET", "/v1/models", origin=OTHER).status_code == 401


def test_a_method_that_is_none_is_refused_in_the_same_form(site: Site) -> None:
    reply = ask(site, "OPTIONS", "/v1/models", origin=PAGE, access_control_request_method="DELETE")
    assert (reply.status_code, reply.headers[ALLOWED]) == (405, PAGE)
    assert "DELETE is not allowed" in reply.json()["error"]["message"]


def test_a_page_may_ask_a_machine_of_a_private_network(site: Site) -> None:
    asked = {**PREFLIGHT, "access-control-request-private-network": "true"}
    reply = ask(site, "OPTIONS", "/v1/models", origin=PAGE, **asked)
    assert reply.headers["access-control-allow-private-network"] == "true"


def test_further_names_need_no_key(open_site: Site) -> None:
    for name in ("host.docker.internal", "HOST.docker.internal:8080", "moe", "moe.", "localhost."):
        assert ask(open_site, "GET", "/v1/models", host=name).status_code == 200
    for name in ("x.moe", "moe.example", "docker.internal", "evil.example:80"):
        reply = ask(open_site, "GET", "/v1/models", host=name)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden_host")
        said = reply.json()["error"]["message"]
        assert f"--allow-host {name.partition(':')[0]}" in said
        assert "--api-key-file" in said
    reply = ask(open_site, "GET", "/v1/models", host="evil.example", origin=PAGE)
    assert (reply.status_code, reply.headers[ALLOWED]) == (403, PAGE)


def test_a_page_without_a_key(open_site: Site) -> None:
    assert ask(open_site, "OPTIONS", "/v1/models", origin=PAGE, **PREFLIGHT).headers[ALLOWED] == PAGE
    assert ask(open_site, "OPTIONS", "/v1/models", origin=OTHER, **PREFLIGHT).status_code == 403
    assert ask(open_site, "GET", "/v1/models", origin=PAGE).headers[ALLOWED] == PAGE


def test_without_a_key_a_request_of_another_page_is_refused_even_if_its_browser_did_not_ask(open_site: Site) -> None:
    def post(origin: str, host: str = "localhost:8080", **headers: str) -> tuple[int, str | None]:
        given = {"origin": origin, "host": host, "content-type": "application/json", **headers}
        reply = httpx2.post(f"{open_site.url}/v1/chat/completions", json={"messages": say("hello")}, headers=given)
        return reply.status_code, reply.json().get("error", {}).get("code")

    before = len(open_site.cluster.requests)
    for origin in (OTHER, "null", "http://localhost:8081", "http://moe:8080", "app://localhost:8080"):
        assert post(origin) == (403, "forbidden_origin")
    assert len(open_site.cluster.requests) == before
    assert ask(open_site, "GET", "/v1/models", origin=OTHER).json()["error"]["code"] == "forbidden_origin"
    for origin, host in ((PAGE, "localhost:8080"), ("http://localhost:8080", "LOCALHOST:8080"), ("https://moe", "moe")):
        assert post(origin, host) == (200, None)


WEBSOCKET = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
}
STRANGE: list[tuple[str, dict[str, str], int]] = [  # method, headers, status
    ("POST", {"content-type": "text/plain"}, 415),
    ("POST", {"content-type": "text/plain; application/json"}, 415),
    ("POST", {"content-type": "multipart/form-data; boundary=x"}, 415),
    ("POST", {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "cross-site"}, 415),
    ("POST", {"content-type": "application/json", "host": "evil.example"}, 403),  # DNS rebinding
    ("GET", WEBSOCKET, 405),
    ("HEAD", {}, 405),
    ("OPTIONS", {}, 405),
    ("OPTIONS", {"origin": OTHER, **PREFLIGHT}, 403),
    *(("POST", {"content-type": kind, "origin": origin}, 403) for kind in ("application/json", "text/plain", "")
      for origin in (OTHER, "null")),
    *(("GET", {**WEBSOCKET, "origin": origin}, 403) for origin in (OTHER, "null")),
]  # fmt: skip


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"],
)
def test_no_protocol_has_a_way_around(open_site: Site, path: str) -> None:
    field = {"/v1/completions": "prompt", "/v1/responses": "input"}.get(path, "messages")
    body = {field: say("hello") if field == "messages" else "hello", "max_tokens": 1}
    before = len(open_site.cluster.requests)
    with httpx2.Client(base_url=open_site.url) as http:
        for method, headers, status in STRANGE:
            reply = http.request(method, path, content=json.dumps(body), headers=headers)
            assert reply.status_code == status, (method, headers)
            if method != "HEAD":
                assert ("type" in reply.json()) == ("messages" in path)  # the form of its own protocol
        assert len(open_site.cluster.requests) == before
        assert http.post(path, json=body).status_code == 200


# The flags.


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["http://localhost:3000"], ("http://localhost:3000",)),
        (["HTTP://LocalHost:3000/"], ("http://localhost:3000",)),
        (["http://a:80", "https://a:443"], ("http://a", "https://a")),
        (["http://a,https://b", "http://a"], ("http://a", "https://b")),
        (["http://[::1]:3000"], ("http://[::1]:3000",)),
        (["vscode-webview://1a2b", "chrome-extension://abc"], ("vscode-webview://1a2b", "chrome-extension://abc")),
        ([], ()),
    ],
)
def test_origins_as_browsers_write_them(given: list[str], read: tuple[str, ...]) -> None:
    assert visitors.read_origins(given, has_key=False) == read


@pytest.mark.parametrize(
    "given",
    ["localhost:3000", "localhost", "http://", "http://a/b", "http://*.a", "http://a:x", "", "http://a b", "a,"],
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="--allow-origin should"):
        visitors.read_origins([given], has_key=True)


@pytest.mark.parametrize("given", ["*", "null", "http://a,*"])
def test_all_origins_need_a_key(given: str) -> None:
    assert visitors.read_origins([given], has_key=True)
    with pytest.raises(UsageError, match="needs an API key") as caught:
        visitors.read_origins([given], has_key=False)
    assert "--api-key-file" in str(caught.value.hint)


def test_host_names() -> None:
    assert visitors.read_host_names(["Host.Docker.Internal.", "moe,a_b"]) == ("host.docker.internal", "moe", "a_b")
    for wrong in ("*", "a:80", "http://a", "", "a b", ".a", "[::1]"):
        with pytest.raises(UsageError, match="--allow-host should"):
            visitors.read_host_names([wrong])


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("LOCALHOST", "localhost"),
        ("localhost.:8080", "localhost"),
        ("[::1]:8080", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("FE80::1", "fe80::1"),
        ("127.0.0.1:", "127.0.0.1"),
    ],
)
def test_every_way_to_write_this_machine(header: str, name: str) -> None:
    assert visitors.host_name(header) == name
    assert visitors.names_this_machine(name, ())


@pytest.mark.parametrize("header", ["", "evil.example", "localhost.evil.example:80", "a@localhost", "a:b:c", "1:2"])
def test_names_that_are_not_this_machines(header: str) -> None:
    assert not visitors.names_this_machine(visitors.host_name(header), ())


def test_what_a_hint_of_a_flag_says_is_taken() -> None:
    with pytest.raises(UsageError) as caught:
        visitors.read_origins(["*"], has_key=False)
    assert caught.value.hint == "add --api-key-file FILE, or name the origins"
    assert visitors.read_origins(["*"], has_key=True) == ("*",)
    assert visitors.read_origins([PAGE], has_key=False) == (PAGE,)
    with pytest.raises(UsageError) as caught:
        visitors.read_origins(["localhost"], has_key=True)
    assert caught.value.hint == "as --allow-origin http://localhost:3000; * alone means all origins"
    for origin in (caught.value.hint.partition(";")[0].split()[-1], "*"):
        assert visitors.read_origins([origin], has_key=True) == (origin,)


def test_what_a_hint_about_names_says_lets_in(site: Site, open_site: Site) -> None:
    with pytest.raises(UsageError) as caught:
        visitors.read_host_names(["http://host.docker.internal:80"])
    assert caught.value.hint == "as --allow-host host.docker.internal; with --api-key-file any name is accepted"
    [name] = visitors.read_host_names([caught.value.hint.partition(";")[0].split()[-1]])
    assert ask(open_site, "GET", "/v1/models", host=name).status_code == 200
    key = f"Bearer {KEY}"
    assert ask(site, "GET", "/v1/models", host="any.example", authorization=key).status_code == 200


def test_keys_share_no_prompt_cache_unless_told() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for share, spaces in ((False, [1, 2, 2]), (True, [0, 0, 0])):
        cluster = FakeCluster()
        app = make_app(cluster, api_keys=("one", "two"), share_cache=share)
        for headers in ({"authorization": "Bearer one"}, {"authorization": "Bearer two"}, {"x_api_key": "two"}):
            assert post(CHAT, body, app=app, **headers)[0] == 200
        assert [request.space for request in cluster.requests] == spaces
        assert post(CHAT, body, app=app, authorization="Bearer onetwo")[0] == 401
        assert not {"one", "two"} & set(str(cluster.requests).split("'"))
    assert post(CHAT, body, app=make_app(cluster))[0] == 200
    assert cluster.requests[-1].space == 0


def test_what_a_hint_about_the_key_or_a_method_says_is_answered(site: Site) -> None:
    for more in ({}, {"authorization": "Bearer wrong"}):
        reply = ask(site, "GET", "/v1/models", **more)
        hint = "it is the one that 'moectl serve' was started with: --api-key or --api-key-file"
        assert (reply.status_code, reply.json()["error"]["hint"]) == (401, hint)
    assert ask(site, "GET", "/v1/models", authorization=f"Bearer {KEY}").status_code == 200
    reply = ask(site, "OPTIONS", "/v1/models", origin=PAGE, access_control_request_method="DELETE")
    said = reply.json()["error"]["hint"]
    assert said.startswith("it has ")
    for method in said.removeprefix("it has ").split(", "):
        allowed = ask(site, "OPTIONS", "/v1/models", origin=PAGE, access_control_request_method=method)
        assert allowed.status_code == 200
