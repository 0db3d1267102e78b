"""What the hints about a controller that runs say is done, and then it succeeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moectl.cluster.sets import delete_set, make_listing
from moectl.errors import RemoteError, StateError
from moectl.server import client
from moectl.server.client import Client, find_running, socket_path
from moectl.server.sockets import listen_unix
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.cli.test_cli import run
from tests.support.running import wait_for
from tests.support.tiny import write_checkpoint, write_words

Call = Callable[..., tuple[int, str, str]]
QUESTION = ("run", "--local", "1", "--max-tokens", "2", "--keep-alive", "5m", "hi")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    yield lambda *words: run(capsys, monkeypatch, *words)
    run(capsys, monkeypatch, "stop", "--now")


def hint_of(err: str) -> str:
    return err.rpartition("Hint: ")[2].strip()


@pytest.mark.long
def test_after_moectl_stop_as_the_hints_say_the_command_succeeds(call: Call) -> None:
    assert call(*QUESTION)[0] == 0
    code, _, err = call(*QUESTION, "--dtype", "bfloat16")
    assert (code, hint_of(err)) == (8, "moectl stop, then run it again")
    assert call("stop")[0] == 0
    assert call(*QUESTION, "--dtype", "bfloat16")[0] == 0
    bench = ("bench", "--local", "1", "-p", "4", "-g", "2", "--num-trials", "1")
    code, _, err = call(*bench)
    assert (code, hint_of(err)) == (8, "moectl stop")
    assert call("stop")[0] == 0
    assert call(*bench)[0] == 0


@pytest.mark.long
def test_after_a_controller_was_stopped_now_as_the_hint_says_the_command_succeeds(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(*QUESTION)[0] == 0
    [path] = find_running()
    pid = Client(path).describe()["pid"]
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(client, "_SILENT_S", 0.5)
        code, _, err = call(*QUESTION)
    assert (code, hint_of(err)) == (8, "moectl stop --now, then run it again")
    assert call("stop", "--now")[0] == 0
    assert call(*QUESTION)[0] == 0


def test_the_command_again_starts_a_new_controller_as_the_hint_says(call: Call) -> None:
    assert call(*QUESTION)[0] == 0
    [path] = find_running()
    gone = Client(path)
    os.kill(gone.describe()["pid"], signal.SIGKILL)
    wait_for(lambda: not find_running())
    with pytest.raises(RemoteError) as caught:
        gone.describe()
    assert caught.value.hint == "run the command again: it starts a new one"
    code, out, err = call(*QUESTION)
    assert (code, bool(out)) == (0, True), err


def test_once_it_has_loaded_as_the_hint_says_an_old_set_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny", n_layers=1))
    made = prepare.shard(str(model), Wanted())
    [one] = make_listing().sets
    monkeypatch.setattr("moectl.cluster.sets._ASK_S", 0.1)
    with listen_unix(socket_path("abc")):
        with pytest.raises(StateError) as caught:
            delete_set(one)
        assert caught.value.hint == "try again when it has loaded"
        monkeypatch.setattr(Client, "describe", lambda self, **_: {"shards": "/another"})
        delete_set(one)
    assert not made.directory.exists()
