"""Tokenizers, snapshots of the cache, clones without Git LFS: told at shard's start, and mended as the hint says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from moectl import __main__
from moectl.errors import CheckpointError, IntegrityError
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.tokenizer_files import KNOWN, KNOWN_VOCABULARY, fetch_tokenizer
from tests.support.hub import Hub
from tests.support.ring import process_env
from tests.support.sshd import Server
from tests.support.tiny import write_checkpoint, write_words

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 6796265\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.close()


def moectl(home: Path, *argv: str, hub: Hub | None = None, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run a command that ends with this code; return its stdout, or its errors when it is not 0.

    In a process of its own where a model runs, or where huggingface_hub has to find the tests' hub as it is imported.
    """
    if hub is None and argv[0] != "run":
        found, out, err = run_here(argv, env or {})
    else:
        there = {"HF_ENDPOINT": hub.endpoint} if hub else {"HF_HUB_OFFLINE": "1"}
        variables = {**process_env(), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **there}
        if hub:
            variables.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "moectl", *argv]
        done = subprocess.run(
            command, env={**variables, **(env or {})}, capture_output=True, text=True, timeout=120, check=False
        )
        found, out, err = done.returncode, done.stdout, done.stderr
    assert found == code, err
    return err if code else out + err


def run_here(argv: Sequence[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    with (
        mock.patch.dict(os.environ, env),
        mock.patch.object(sys, "argv", ["moectl", *argv]),
        mock.patch.object(sys, "stdin", None),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = __main__.run()
    return code, out.getvalue(), err.getvalue()


def copy_demo(directory: Path, *without: str) -> Path:
    shutil.copytree(DEMO, directory)
    for name in without:
        (directory / name).unlink()
    return directory


def write_dbrx_as_it_came(directory: Path) -> Path:
    """Write a tiny DBRX with the real vocabulary's size, and a tokenizer that is code, as databricks published it."""
    write_checkpoint(
        directory, n_layers=1, n_experts=2, top_k=1, ffn_hidden=64, d_model=32, vocab_size=KNOWN_VOCABULARY
    )
    code = {"AutoTokenizer": ["tiktoken.TiktokenTokenizerWrapper", None]}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": code, "tokenizer_class": "TiktokenTokenizerWrapper", "chat_template": "{{ messages }}"})
    )
    (directory / "tiktoken.py").write_text("raise SystemExit('run')")
    return directory


def test_dbrx_takes_its_known_tokenizer_and_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.add("alpindale/dbrx-instruct", write_dbrx_as_it_came(tmp_path / "served"))
    shard = ("shard", "alpindale/dbrx-instruct", "--nodes", "1", "--no-canary", "-o", str(tmp_path / "set"))
    said = moectl(tmp_path, *shard, hub=hub, code=4)
    assert "alpindale/dbrx-instruct has no tokenizer.json" in said
    assert f"{KNOWN} cannot be downloaded: " in said
    assert f"Hint: moectl shard alpindale/dbrx-instruct --tokenizer {KNOWN}\n" in said
    assert not (tmp_path / "set").exists()
    hub.add(KNOWN, write_words(tmp_path / "words"))
    said = moectl(tmp_path, *shard, hub=hub)
    assert f"alpindale/dbrx-instruct has no tokenizer.json: taking DBRX's from {KNOWN}" in said
    manifest = json.loads((tmp_path / "set/moectl.json").read_text())
    assert "tokenizer.json" in manifest["files"]
    assert "auto_map" not in json.loads((tmp_path / "set/tokenizer_config.json").read_text())
    moectl(tmp_path, *shard, "--tokenizer", KNOWN, hub=hub)  # what the hint says
    moectl(tmp_path, "shard", "--verify", str(tmp_path / "set"))


def test_a_checkpoint_without_a_tokenizer_is_refused_before_anything_is_cut(tmp_path: Path) -> None:
    source = copy_demo(tmp_path / "my model", "tokenizer.json")
    said = moectl(tmp_path, "shard", str(source), "--nodes", "1", "-o", str(tmp_path / "set"), code=4)
    hint = re.search("Hint: moectl (.*) REPO\\|DIR\n", said)
    assert hint is not None
    assert not (tmp_path / "set").exists()
    done = moectl(tmp_path, *shlex.split(hint[1]), str(DEMO), "-n", "1", "-o", str(tmp_path / "set"), "--no-canary")
    assert "one shard" in done
    run = ("run", "--shards", str(tmp_path / "set"), "--keep-alive", "0", "--max-tokens", "4", "hi")
    assert moectl(tmp_path, *run)


def test_a_checkpoint_whose_files_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    model = copy_demo(tmp_path / "model")
    for path in model.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    moectl(tmp_path, "shard", str(model), "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary")
    assert fetch_tokenizer(str(model), 1536).has_template


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    other = write_words(tmp_path / "other", {"c": 10**6})
    shard = ("shard", str(DEMO), "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary")
    assert "its tokens go up to 1000000" in moectl(tmp_path, *shard, "--tokenizer", str(other), code=4)
    source = copy_demo(tmp_path / "source")
    shutil.copy(other / "tokenizer.json", source / "tokenizer.json")
    wrong = ("shard", str(source), "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary")
    said = moectl(tmp_path, *wrong, code=4)
    assert "Hint: --tokenizer REPO|DIR takes this model's own\n" in said
    moectl(tmp_path, *wrong, "--tokenizer", str(DEMO))


@pytest.mark.parametrize("text", ["{", "[]", "{}", POINTER])
def test_a_tokenizer_that_cannot_be_read_is_told_at_once(tmp_path: Path, text: str) -> None:
    source = copy_demo(tmp_path / "source")
    (source / "tokenizer.json").write_text(text)
    said = moectl(tmp_path, "shard", str(source), "--nodes", "1", "--dry-run", code=7 if text == POINTER else 4)
    assert "tokenizer.json" in said


@pytest.mark.long
def test_an_added_tokenizer_is_deployed(sshd: Server, tmp_path: Path) -> None:
    shards, hosts = tmp_path / "set", tmp_path / "hosts.txt"
    hosts.write_text(f"{sshd.add_alias('node0')} ip=127.0.0.1 python={sys.executable} dir={tmp_path}/node\n")
    config = {"MOECTL_SSH_CONFIG": str(sshd.config), "MOECTL_HOSTFILE": str(hosts)}
    words = write_words(tmp_path / "words")
    moectl(tmp_path, "shard", str(DEMO), "--tokenizer", str(words), "--nodes", "1", "-o", str(shards), "--no-canary")
    assert (shards / "chat_template.jinja").is_file()  # the model's own: the other one has none
    shutil.copy(DEMO / "tokenizer.json", shards)  # by hand, as people do
    said = moectl(tmp_path, "deploy", "--dry-run", "--shards", str(shards), env=config)
    hint = re.search("is not in the set's manifest and is not sent: moectl (.*)", said)
    assert hint is not None
    moectl(tmp_path, *shlex.split(hint[1]))
    said = moectl(tmp_path, "deploy", "--shards", str(shards), env=config)
    assert "is not sent" not in said
    moectl(tmp_path, "shard", "--add-tokenizer", str(DEMO), "-o", str(shards))
    moectl(tmp_path, "shard", "--verify", str(shards))
    moectl(tmp_path, "deploy", "--shards", str(shards), env=config)
    [there] = (tmp_path / "node/shards").glob("*/tokenizer.json")
    assert there.read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    assert moectl(tmp_path, "run", "--keep-alive", "0", "--max-tokens", "4", "hi", env=config)


@pytest.mark.long
def test_a_worker_without_a_tokenizer_says_how_to_add_one(tmp_path: Path) -> None:
    shards = tmp_path / "data/moectl/shards/mine"
    moectl(tmp_path, "shard", str(DEMO), "--nodes", "1", "-o", str(shards), "--no-canary")
    (shards / "tokenizer.json").write_text("{}")  # as an older moectl cut it
    manifest = json.loads((shards / "moectl.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (shards / "moectl.json").write_text(json.dumps(manifest))
    (shards / ".moectl-verified.json").unlink(missing_ok=True)
    run = ("run", "--shards", str(shards), "--keep-alive", "0", "--max-tokens", "4", "hi")
    said = moectl(tmp_path, *run, code=4)
    assert "Hint: moectl shard --add-tokenizer REPO|DIR (for DBRX: " in said
    env = {"XDG_DATA_HOME": str(tmp_path / "data")}  # its newest set is this one
    assert str(shards) in moectl(tmp_path, "shard", "--add-tokenizer", str(DEMO), env=env)
    assert moectl(tmp_path, *run)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "LICENSE"])
def test_a_git_lfs_pointer_is_told_before_anything_is_read(tmp_path: Path, name: str) -> None:
    source = copy_demo(tmp_path / "a clone")
    (source / name).write_text(POINTER)
    with pytest.raises(IntegrityError) as caught:
        open_checkpoint(str(source))
    assert caught.value.message == f"{name} in {source} is a Git LFS pointer, not the file"
    assert shlex.split(caught.value.hint or "") == ["git", "-C", str(source), "lfs", "pull"]
    shutil.copy(DEMO / name, source / name)  # what that command does
    open_checkpoint(str(source)).close()


def test_a_snapshot_goes_by_its_repositorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--acme--tiny"
    snapshot = copy_demo(cache / "snapshots" / COMMIT)
    with open_checkpoint(str(snapshot)) as opened:
        assert (opened.source, opened.revision) == ("acme/tiny", COMMIT)
    for where in (cache, cache / "snapshots", Path()):
        monkeypatch.chdir(cache)
        with pytest.raises(CheckpointError, match="has no snapshot of main") as caught:
            open_checkpoint(str(where))
        assert caught.value.hint == f"give one of its snapshots: {snapshot}"
    with open_checkpoint((caught.value.hint or "").split(": ")[1]) as opened:
        assert opened.source == "acme/tiny"
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(COMMIT)
    for revision in (None, "main", COMMIT):
        for where in (cache, cache / "snapshots", Path()):
            with open_checkpoint(str(where), revision=revision) as opened:
                assert (opened.source, opened.revision) == ("acme/tiny", COMMIT)
    with pytest.raises(CheckpointError, match="has no snapshot of v2"):
        open_checkpoint(str(cache), revision="v2")
    said = moectl(tmp_path, "shard", str(snapshot), "--nodes", "1", "--dry-run")
    assert "/tiny-bf16-hidden-1." in said
