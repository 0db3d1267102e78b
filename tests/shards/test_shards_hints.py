"""What the hints about checkpoints, the Hub and shard sets say is done, and then it succeeds."""

from __future__ import annotations

import contextlib
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moectl.errors import CheckpointError, IntegrityError, MoectlError, NotSharded, StateError
from moectl.shards import prepare
from moectl.shards.journal import lock_directory
from moectl.shards.prepare import Wanted
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.source.hub import _lock
from moectl.shards.source.hub_errors import MIRRORS
from moectl.shards.tokenizer_files import KNOWN, fetch_tokenizer
from moectl.shards.verified import check_files
from tests.shards.test_hub_environment import DEMO, DRY, moectl
from tests.support.hub import Fault, Hub, _Handler
from tests.support.tiny import write_checkpoint, write_words


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        server.add("acme/tiny", DEMO)
        yield server


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    server = Hub()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_words(write_checkpoint(tmp_path / "tiny"))


def hint_of(call: Callable[[], Any], kind: type[MoectlError]) -> str:
    """Return the hint of the error that this raises."""
    with pytest.raises(kind) as caught:
        call()
    return caught.value.hint or ""


def told(said: str) -> str:
    """Return the hint in what a command printed."""
    return said.rpartition("Hint: ")[2].strip()


def test_what_the_hint_about_a_directory_says_is_a_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hint = hint_of(lambda: open_checkpoint(str(tmp_path / "empty")), CheckpointError)
    assert hint == "name what holds config.json and the weights"
    assert open_checkpoint(str(model)).config


def test_what_the_hint_about_another_quantisation_says_is_cut(model: Path) -> None:
    config = model / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    hint = hint_of(lambda: prepare.shard(str(model), Wanted()), CheckpointError)
    assert hint.startswith("start from the 16-bit checkpoint, or from one that MLX has quantised")
    config.write_text(before)
    made = prepare.shard(str(model), Wanted(bits=4))
    assert made.directory.name == "tiny-q4-hidden-1"


@pytest.mark.long
def test_the_mirrors_that_hints_name_are_taken(hub: Hub, tmp_path: Path) -> None:
    plain = hub.add("acme/pickled", DEMO)
    plain.files = {name: data for name, data in plain.files.items() if not name.endswith(".safetensors")}
    plain.promise()
    for name in MIRRORS:
        hub.repos.pop(name, None)

    def refused(name: str, **variables: str) -> str:
        code, _, said = moectl(hub, tmp_path, "shard", name, "--nodes", "1", "--dry-run", **variables)
        assert code == 4, said
        return told(said)

    assert refused("acme/pickled").startswith("pickled (.bin, .pt) and GGUF weights are not read; take a ")
    assert refused("acme/absent", HF_TOKEN="hf_accepted") == "correct the name: OWNER/NAME at https://huggingface.co"
    assert "mirror" not in refused("acme/absent")  # those that moectl knows are of DBRX
    absent = refused("acme/dbrx-absent", HF_TOKEN="hf_accepted")
    assert absent == "try a mirror: " + ", ".join(MIRRORS)
    hub.add(MIRRORS[0], DEMO)
    for name in (MIRRORS[0], "acme/tiny"):
        assert moectl(hub, tmp_path, "shard", name, "--nodes", "1", "--dry-run")[0] == 0


@pytest.mark.parametrize("right", ["acme/tiny", str(DEMO)])
@pytest.mark.long
def test_the_name_that_the_hint_asks_for_is_taken(hub: Hub, tmp_path: Path, right: str) -> None:
    code, _, said = moectl(hub, tmp_path, "shard", "acme/tiny--more", "--nodes", "1", "--dry-run")
    assert (code, told(said)) == (4, "use OWNER/NAME or a path")
    assert moectl(hub, tmp_path, "shard", right, "--nodes", "1", "--dry-run")[0] == 0


@pytest.mark.long
def test_without_the_variable_that_a_hint_names_it_succeeds(hub: Hub, tmp_path: Path) -> None:
    code, _, said = moectl(hub, tmp_path, *DRY, HF_HUB_OFFLINE="1")
    assert (code, told(said)) == (5, "unset HF_HUB_OFFLINE, or give a directory")
    assert moectl(hub, tmp_path, "shard", str(DEMO), "--nodes", "1", "--dry-run", HF_HUB_OFFLINE="1")[0] == 0
    shard = ("shard", "acme/tiny", "--nodes", "1", "--no-canary", "--keep-source", "-o")
    assert moectl(hub, tmp_path, *shard, str(tmp_path / "set"), HF_HUB_OFFLINE=None)[0] == 0
    code, _, said = moectl(hub, tmp_path, *shard, str(tmp_path / "next"), HF_ENDPOINT="no address")
    assert (code, told(said)) == (2, "unset HF_ENDPOINT")
    # Without it the real Hub would be asked: what came before is in the cache.
    done = moectl(hub, tmp_path, *shard, str(tmp_path / "next"), HF_ENDPOINT=None, HF_HUB_OFFLINE="1")
    assert done[0] == 0, done[2]


def test_another_mirror_as_the_hint_says_has_the_model(hub: Hub, tmp_path: Path) -> None:
    with running_hub() as poor:
        listing = [{"rfilename": entry["rfilename"]} for entry in poor.add("acme/tiny", DEMO).listing]

        class Handler(_Handler):
            hub = poor

            def _serve_info(self, path: str) -> None:
                self._answer(200, json.dumps({"id": "acme/tiny", "siblings": listing}).encode(), {})

            def send_header(self, keyword: str, value: str) -> None:
                if keyword != "X-Repo-Commit":
                    super().send_header(keyword, value)

        poor._server.RequestHandlerClass = Handler
        code, _, said = moectl(poor, tmp_path, *DRY)
    assert (code, told(said)) == (4, "use another mirror, or unset HF_ENDPOINT")
    assert moectl(hub, tmp_path, *DRY)[0] == 0


def test_the_same_command_again_resumes_as_the_hint_says(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("/resolve/", status=503, headers={"Retry-After": "3600"}))
    shard = ("shard", "acme/tiny", "--nodes", "1", "--no-canary", "-o", str(tmp_path / "set"))
    code, _, said = moectl(hub, tmp_path, *shard)
    assert (code, told(said)) == (5, "run the same command again in 3600 s: it resumes")
    hub.forget()
    assert moectl(hub, tmp_path, *shard)[0] == 0


@pytest.mark.long
def test_the_same_command_again_as_the_hint_says_fetches_what_came_damaged(hub: Hub, tmp_path: Path) -> None:
    repo = hub.add("acme/damaged", DEMO)
    [name] = [name for name in repo.files if name.endswith(".safetensors")]
    whole = repo.files[name]
    repo.files[name] = whole[:-1] + bytes([whole[-1] ^ 1])
    shard = ("shard", "acme/damaged", "--nodes", "1", "--no-canary", "--keep-source", "-o", str(tmp_path / "set"))
    code, _, said = moectl(hub, tmp_path, *shard)
    assert (code, told(said)) == (7, "run the same command again")
    repo.files[name] = whole
    assert moectl(hub, tmp_path, *shard)[0] == 0


@pytest.mark.parametrize("other", [None, "REQUESTS_CA_BUNDLE"])
@pytest.mark.long
def test_the_certificates_that_the_hint_asks_for_are_believed(other: str | None, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "company.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *subject],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with running_hub() as hub:
        hub.add("acme/tiny", DEMO)
        hub._server.socket = context.wrap_socket(hub._server.socket, server_side=True)
        variables: dict[str, str | None] = {
            "HF_ENDPOINT": hub.endpoint.replace("http:", "https:"),
            "REQUESTS_CA_BUNDLE": None,
            "CURL_CA_BUNDLE": None,
            **({other: str(certificate)} if other else {}),
        }
        code, _, said = moectl(hub, tmp_path, *DRY, **variables)
        assert code == 5, said
        if other:
            assert told(said) == f"{other} is not read here: SSL_CERT_FILE is; set it to the same file"
        else:
            assert told(said) == "set SSL_CERT_FILE to a file with the certificates that this network uses"
        done = moectl(hub, tmp_path, *DRY, **variables, SSL_CERT_FILE=str(certificate))
        assert done[0] == 0, done[2]


def test_who_waits_for_a_download_as_the_hint_says_has_it(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    with partial.open("ab") as first, partial.open("ab") as second:
        _lock(first, tmp_path)
        assert hint_of(lambda: _lock(second, tmp_path), StateError) == "wait for it, or end it"
        first.close()
        _lock(second, tmp_path)


def test_who_waits_for_another_shard_as_the_hint_says_cuts_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def cut() -> prepare.Made:
        return prepare.shard(str(model), Wanted(nodes=2), directory=out)

    with lock_directory(out):
        assert hint_of(cut, StateError) == "wait until it has finished, or end it"
    assert cut().directory == out


def test_the_shard_command_that_a_hint_names_makes_what_was_missing(model: Path) -> None:
    assert hint_of(lambda: prepare.newest_shards(None), NotSharded) == "moectl shard MODEL"
    made = prepare.shard(str(model), Wanted(nodes=2))
    assert prepare.newest_shards(None)[0] == made.directory
    assert hint_of(lambda: prepare.newest_shards(3), NotSharded) == "moectl shard MODEL --nodes 3"
    made = prepare.shard(str(model), Wanted(nodes=3))
    assert prepare.newest_shards(3)[0] == made.directory


def test_the_same_shard_again_as_the_hint_says_mends_a_manifest(model: Path) -> None:
    made = prepare.shard(str(model), Wanted(nodes=2))
    (made.directory / "moectl.json").write_bytes(b"\xff\xfe")
    hint = hint_of(lambda: prepare.find_shards(made.directory), IntegrityError)
    assert hint == "run the same 'moectl shard' again"
    prepare.shard(str(model), Wanted(nodes=2))
    manifest = prepare.find_shards(made.directory)[1]
    check_files(made.directory, manifest, 0)


def test_without_the_link_that_a_hint_names_a_tokenizer_is_added(hub: Hub, tmp_path: Path) -> None:
    shards = tmp_path / "set"
    assert moectl(hub, tmp_path, "shard", str(DEMO), "--nodes", "1", "-o", str(shards), "--no-canary")[0] == 0
    link = shards / "elsewhere"
    link.symlink_to(tmp_path)
    add = ("shard", "--add-tokenizer", str(DEMO), "-o", str(shards))
    code, _, said = moectl(hub, tmp_path, *add)
    assert code == 7
    assert told(said) == "remove it; to keep a shard set on another disk, put the whole directory there"
    link.unlink()
    assert moectl(hub, tmp_path, *add)[0] == 0
    shutil.move(shards, tmp_path / "disk")
    shards.symlink_to(tmp_path / "disk")
    assert moectl(hub, tmp_path, *add)[0] == 0


def test_the_tokenizer_that_a_hint_names_is_taken(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    hint = hint_of(lambda: fetch_tokenizer(str(bare), 128), CheckpointError)
    assert hint == f"take another one, such as {KNOWN} for DBRX"
    assert fetch_tokenizer(str(write_words(tmp_path / "words")), 128).files
