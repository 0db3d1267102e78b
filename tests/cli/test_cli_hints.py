"""What the hints of the command line say is typed, and then it succeeds."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from moectl.cluster.setup.record import open_record, record_path
from tests.cli.test_cli import run
from tests.cli.test_setup import PAIR, entry
from tests.support import cabling
from tests.support.fake_mac import FakeMac, record, start_mac
from tests.support.sshd import Server
from tests.support.terminal import Terminal
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


@pytest.mark.long
def test_as_many_ranks_as_the_hint_says_are_taken(call: Any, tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny"))
    assert call("shard", str(model), "--nodes", "1", "-o", "set", "--no-canary")[0] == 0
    code, _, err = call("run", "--shards", "set", "--local", "3", "hi")
    hint = hint_of(err)
    assert (code, hint) == (2, "use --local 1")
    words = ("--raw", "--max-tokens", "2", "--keep-alive", "0", "hi")
    code, out, err = call("run", "--shards", "set", *hint.removeprefix("use ").split(), *words)
    assert (code, bool(out)) == (0, True), err


@pytest.mark.long
def test_a_text_as_it_is_as_the_hint_says_needs_no_template(call: Any, tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny", n_layers=1))
    assert call("shard", str(model), "--nodes", "1", "-o", "set", "--no-canary")[0] == 0
    words = ("run", "--shards", "set", "--max-tokens", "2", "--keep-alive", "0", "a b")
    code, _, err = call(*words)
    hint = hint_of(err)
    assert (code, hint) == (2, "send the text as it is: moectl run --raw, or /v1/completions")
    assert call(*words, "--raw")[0] == 0


def test_the_context_takes_a_prompt_as_short_as_the_hint_says(call: Any) -> None:
    demo = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"
    words = ("bench", "--model", str(demo), "--local", "1", "-g", "2", "--num-trials", "1")
    code, _, err = call(*words, "-p", "5000")
    hint = hint_of(err)
    assert code == 2
    assert hint.startswith("use -p ")
    assert hint.endswith(", or less")
    assert call(*words, "-p", "16")[0] == 0
    assert int(hint.removeprefix("use -p ").removesuffix(", or less")) >= 16


@pytest.fixture
def pair(sshd: Server, tmp_path: Path) -> list[FakeMac]:
    """Two Macs mac0 and mac1 with RDMA, cabled to each other, and their hosts.txt."""
    (tmp_path / "hosts.txt").write_text("mac0\nmac1 memory=64GB\n")
    return [start_mac(sshd, tmp_path / f"mac{mac}", mac, record(mac, cabling.mesh(2))) for mac in range(2)]


def test_setup_takes_the_flag_and_the_terminal_that_its_hints_name(
    call: Any, pair: list[FakeMac], tmp_path: Path
) -> None:
    code, _, err = call("setup", "hosts.txt", "--apply")
    assert (code, hint_of(err)) == (2, "use --yes to skip the question")
    for mac in pair:
        mac.change(password="open sesame")
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert (code, hint_of(err)) == (5, "run it from a terminal, or run the commands of the dry run by hand")
    with Terminal([sys.executable, "-m", "moectl", "setup", "hosts.txt", "--apply", "-y"], tmp_path) as terminal:
        for line in ("Looking at mac0, mac1", "note  addresses are gone", "Password for sudo"):
            terminal.wait_for(line)
        terminal.type("open sesame\r")
        for line in ("[mac0] sudo route change", "[mac1] sudo route change"):
            terminal.wait_for(line)
        terminal.wait_for("6 commands run")
        assert terminal.end() == 0
    assert [mac.commands for mac in pair] == PAIR


def test_setup_undoes_with_the_flag_that_its_hint_names(call: Any, pair: list[FakeMac]) -> None:
    assert call("setup", "hosts.txt", "--apply", "--yes")[0] == 0
    code, _, err = call("setup", "--undo")
    assert (code, hint_of(err)) == (2, "use --yes to skip the question")
    assert call("setup", "--undo", "--yes")[0] == 0


def test_without_the_damaged_record_that_its_hint_has_removed_setup_works(call: Any) -> None:
    with open_record() as found:
        found.finish(found.begin(entry()))
    record_path().write_bytes(record_path().read_bytes() + b'{"begin": "x"}\n')
    code, _, err = call("setup", "--undo", "--yes")
    assert code == 8
    hint = 'read it: each line with "undo" is a command to type on its host; then remove the file'
    assert hint_of(err) == hint
    assert '"undo": ["ifconfig", "bridge0", "up"]' in record_path().read_text()
    record_path().unlink()
    assert call("setup", "--undo", "--yes")[:2] == (0, "There is nothing to undo.\n")
