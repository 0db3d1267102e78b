"""Variables of huggingface_hub and what lies below it: a bad one is named, and what its hint says mends it.

The Hub is the tests' own; its client is the real one, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.shards.source.hub_environment import explain_certificates
from moectl.shards.source.hub_errors import hub_error
from tests.support.hub import Fault, Hub, _Handler
from tests.support.ring import process_env
from tests.support.sshd import find_free_port

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"
HIDDEN = ("HF_HUB_OFFLINE", "SSL_CERT_FILE", "SSL_CERT_DIR", "HF_TOKEN", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    server.add("acme/tiny", DEMO)
    yield server
    server.close()


# moectl, which waits less before it tries again.
QUICK = """
import sys
from moectl.__main__ import main
from moectl.shards.source import hub
hub._RETRY_WAITS_S = (0.01,) * len(hub._RETRY_WAITS_S)
sys.argv[0] = "moectl"
main()
"""


def moectl(hub: Hub, home: Path, *argv: str, **variables: str | None) -> tuple[int, str, str]:
    """Run a command with these variables (None: without it); return its exit code, what it printed and its errors."""
    env: dict[str, str | None] = {k: v for k, v in process_env().items() if k.lower() not in map(str.lower, HIDDEN)}
    env |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *argv],
        env={k: v for k, v in env.items() if v is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


LONG = pytest.mark.long
DRY = ("shard", "acme/tiny", "--nodes", "1", "--dry-run")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "ten", "is 'ten', not a whole number of seconds"),
        pytest.param("HF_HUB_ETAG_TIMEOUT", "-1", "is '-1', not a whole number of seconds", marks=LONG),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", "is /nonexistent/ca.pem: No such file or directory"),
        pytest.param("SSL_CERT_FILE", __file__, f"is {__file__}, which holds no certificates", marks=LONG),
        ("SSL_CERT_DIR", "/nonexistent/certs", "is /nonexistent/certs: no such directory"),
        ("HTTPS_PROXY", "http://proxy:port", "is not an address such as http://proxy.local:3128"),
        pytest.param("http_proxy", "a:b:c", "is not an address such as http://proxy.local:3128", marks=LONG),
        pytest.param("ALL_PROXY", "ftp://proxy", "is not an address such as http://proxy.local:3128", marks=LONG),
        pytest.param("HF_TOKEN", "hf_a…b", "holds characters that no token has", marks=LONG),
        ("HF_TOKEN", "hf_a b", "holds characters that no token has"),
    ],
)
def test_a_variable_that_stops_the_hub_is_named(hub: Hub, tmp_path: Path, name: str, value: str, why: str) -> None:
    code, out, said = moectl(hub, tmp_path, *DRY, **{name: value})
    assert (code, out) == (2, "")
    assert said.startswith(f"Error: {name} {why}\nHint: ")
    hint = re.search(r"Hint: .*?unset (\w+)\n", said)
    assert hint is not None
    assert moectl(hub, tmp_path, *DRY, **{hint[1]: None})[0] == 0


@pytest.mark.parametrize(
    "value",
    ["127.0.0.1:9", "", *(pytest.param(value, marks=LONG) for value in ("ftp://hub", "http://[::1", "http://a b"))],
)
def test_an_endpoint_that_is_none_is_named_and_not_needed_for_a_directory(hub: Hub, tmp_path: Path, value: str) -> None:
    said = f"Error: HF_ENDPOINT is {value!r}, not an address such as https://huggingface.co\nHint: unset HF_ENDPOINT\n"
    assert moectl(hub, tmp_path, *DRY, HF_ENDPOINT=value) == (2, "", said)
    assert moectl(hub, tmp_path, "shard", str(DEMO), "--nodes", "1", "--dry-run", HF_ENDPOINT=None)[0] == 0


def test_what_is_well_is_not_refused(hub: Hub, tmp_path: Path) -> None:
    fine = {
        "HF_TOKEN": "hf_accepted\n",
        "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": "proxy:3128",
        "HF_HUB_ETAG_TIMEOUT": "7",
    }
    assert moectl(hub, tmp_path, *DRY, **fine, SSL_CERT_DIR=f"/nonexistent{os.pathsep}{tmp_path}")[0] == 0


def test_a_worker_does_not_mind_what_is_for_the_hub(hub: Hub, tmp_path: Path) -> None:
    shards = tmp_path / "set"
    assert moectl(hub, tmp_path, "shard", str(DEMO), "--nodes", "1", "-o", str(shards), "--no-canary")[0] == 0
    run = ("run", "--shards", str(shards), "--keep-alive", "0", "--max-tokens", "4", "hi")
    code, out, said = moectl(hub, tmp_path, *run, HF_HUB_DOWNLOAD_TIMEOUT="ten", HF_ENDPOINT="http://[::1")
    assert (code, bool(out)) == (0, True), said


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    code, _, said = moectl(hub, tmp_path, *DRY, HF_HOME=str(tmp_path / "file" / "hf"))
    assert code in (2, 8)
    assert str(tmp_path / "file") in said
    assert "Hint: set HF_HOME to a directory that can be written to\n" in said
    assert moectl(hub, tmp_path, *DRY, HF_HOME=str(tmp_path / "other"))[0] == 0


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", None])
def test_a_certificate_that_is_not_believed_has_a_hint(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(other, raising=False)
    if name:
        monkeypatch.setenv(name, "/etc/company.pem")
    error = hub_error(
        ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer"), "a/b", "config.json"
    )
    assert error.hint == explain_certificates("CERTIFICATE_VERIFY_FAILED")
    assert "SSL_CERT_FILE" in (error.hint or "")
    assert name is None or (error.hint or "").startswith(f"{name} is not read here")


def test_the_hubs_own_words_reach_the_person(hub: Hub, tmp_path: Path) -> None:
    words = "Access to model acme/tiny is restricted. You must be authenticated to access it."
    headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": words}
    hub.faults.append(Fault("/api/models/", status=403, headers=headers))
    code, _, said = moectl(hub, tmp_path, *DRY)
    assert code == 4
    assert words in said
    hub.forget()


@pytest.mark.parametrize("sha", [True, False])
def test_a_mirror_whose_listing_has_no_sizes(
    hub: Hub, tmp_path: Path, sha: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.repos["acme/tiny"]

    def serve(handler: Any, path: str) -> None:
        info = {"id": "acme/tiny", "siblings": [{"rfilename": entry["rfilename"]} for entry in repo.listing]}
        body = json.dumps(info | ({"sha": repo.commit} if sha else {})).encode()
        handler._answer(200, body, {"Content-Type": "application/json"})

    monkeypatch.setattr("tests.support.hub._Handler._serve_info", serve)
    code, _, said = moectl(
        hub, tmp_path, "shard", "acme/tiny", "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary"
    )
    assert code == 0, said
    assert json.loads((tmp_path / "set/moectl.json").read_text())["revision"] == repo.commit
    code, _, said = moectl(hub, tmp_path, "shard", "--verify", str(tmp_path / "set"))
    assert code == 0, said


@pytest.mark.parametrize(("lacks", "what"), [("X-Repo-Commit", "at which commit"), ("Content-Length", "how large")])
def test_a_mirror_that_says_too_little_is_named(
    hub: Hub, tmp_path: Path, lacks: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.repos["acme/tiny"]
    sha = {} if lacks == "X-Repo-Commit" else {"sha": repo.commit}
    body = json.dumps({"id": "acme/tiny", "siblings": [{"rfilename": "config.json"}], **sha}).encode()
    monkeypatch.setattr("tests.support.hub._Handler._serve_info", lambda handler, path: handler._answer(200, body, {}))
    original = _Handler.send_header

    def send_header(handler: Any, name: str, value: str) -> None:
        if name != lacks or handler.command != "HEAD":
            original(handler, name, value)

    monkeypatch.setattr("tests.support.hub._Handler.send_header", send_header)
    code, _, said = moectl(hub, tmp_path, *DRY)
    assert code == 4
    assert f"Error: the server at {hub.endpoint} does not say {what}" in said
    assert "Hint: use another mirror, or unset HF_ENDPOINT\n" in said


def test_a_proxy_that_does_not_answer_is_named_and_the_hint_mends_it(hub: Hub, tmp_path: Path) -> None:
    code, _, said = moectl(hub, tmp_path, *DRY, HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="", no_proxy="")
    assert code == 5
    assert f"did not come from {hub.endpoint} through the proxy of HTTP_PROXY: " in said
    assert "Hint: correct or unset HTTP_PROXY\n" in said
    assert moectl(hub, tmp_path, *DRY, HTTP_PROXY=None)[0] == 0


def test_what_the_hint_about_the_network_says_mends_it(hub: Hub, tmp_path: Path) -> None:
    code, _, said = moectl(hub, tmp_path, *DRY, HF_ENDPOINT=f"http://127.0.0.1:{find_free_port()}")
    assert code == 5
    hint = "Hint: check the network, then run the same command again: it resumes; "
    assert f"{hint}if acme/tiny is a directory, there is none of that name here\n" in said
    assert moectl(hub, tmp_path, *DRY)[0] == 0
    shutil.copytree(DEMO, tmp_path / "here")
    assert moectl(hub, tmp_path, "shard", str(tmp_path / "here"), *DRY[2:])[0] == 0
