"""What the hints of the command line say is typed, and then it succeeds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import run
from tests.support.tiny import write_checkpoint, write_words


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(capsys, monkeypatch, *words)


def hint_of(err: str) -> str:
    return err.rpartition("Hint: ")[2].strip()


def test_an_option_goes_where_the_hint_puts_it(call: Any) -> None:
    code, _, err = call("-qH", "10.0.0.1", "hosts")
    hint = hint_of(err)
    assert (code, hint) == (2, "put -q after the verb: moectl hosts -qH 10.0.0.1")
    assert call(*shlex.split(hint.partition(": moectl ")[2]))[0] == 0
    code, _, err = call("--prune")
    hint = hint_of(err)
    assert (code, hint) == (2, "put --prune after its verb: moectl list --prune …")
    assert call(*shlex.split(hint.partition(": moectl ")[2].removesuffix(" …")))[0] == 0


def test_as_many_ranks_as_the_hint_says_are_taken(call: Any, tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny"))
    assert call("shard", str(model), "-n", "1", "-o", "set", "--no-canary")[0] == 0
    code, _, err = call("run", "--shards", "set", "--local", "3", "hi")
    hint = hint_of(err)
    assert (code, hint) == (2, "use --local 1")
    words = ("--raw", "-m", "2", "--keep-alive", "0", "hi")
    code, out, err = call("run", "--shards", "set", *hint.removeprefix("use ").split(), *words)
    assert (code, bool(out)) == (0, True), err


def test_the_context_takes_a_prompt_as_short_as_the_hint_says(call: Any) -> None:
    demo = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"
    words = ("bench", "--model", str(demo), "--local", "1", "-g", "2", "-n", "1")
    code, _, err = call(*words, "-p", "5000")
    hint = hint_of(err)
    assert code == 2
    assert hint.startswith("use -p ") and hint.endswith(", or less")
    assert call(*words, "-p", "16")[0] == 0
    assert int(hint.removeprefix("use -p ").removesuffix(", or less")) >= 16
