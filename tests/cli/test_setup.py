"""`moectl setup` from the command line: Macs behind a real sshd whose tools are fakes that remember what was done."""

from __future__ import annotations

import io
import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl import __main__
from moectl.cluster.setup.record import RecordedCommand, open_record, read_record, record_path
from moectl.errors import StateError
from moectl.hosts.hostfile import Host, read_hosts
from tests.support import cabling
from tests.support.fake_mac import FakeMac, record, start_mac
from tests.support.sshd import Server
from tests.support.terminal import Terminal

Call = Callable[..., tuple[int, str, str]]
PAIR = [
    [
        "ifconfig bridge0 down",
        "ifconfig en2 inet 192.168.0.1 netmask 255.255.255.252",
        "route change 192.168.0.2 -interface en2",
    ],
    [
        "ifconfig bridge0 down",
        "ifconfig en2 inet 192.168.0.2 netmask 255.255.255.252",
        "route change 192.168.0.1 -interface en2",
    ],
]
UNDO = [
    ["route delete 192.168.0.2", "ifconfig en2 inet 192.168.0.1 delete", "ifconfig bridge0 up"],
    ["route delete 192.168.0.1", "ifconfig en2 inet 192.168.0.2 delete", "ifconfig bridge0 up"],
]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command line in this process, without a terminal; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", *words])
        code = __main__.run()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def pair(sshd: Server, tmp_path: Path) -> list[FakeMac]:
    """Two Macs mac0 and mac1 with RDMA, cabled to each other, and their hosts.txt."""
    (tmp_path / "hosts.txt").write_text("mac0\nmac1 memory=64GB\n")
    return [start_mac(sshd, tmp_path / f"mac{mac}", mac, record(mac, cabling.mesh(2))) for mac in range(2)]


def is_up(mac: FakeMac) -> tuple[bool, bool]:
    """Return whether its bridge is up, and whether its port has an address."""
    return "<UP," in mac.interfaces["bridge0"], "inet " in mac.interfaces["en2"]


def test_nothing_is_changed_without_apply(call: Call, pair: list[FakeMac], tmp_path: Path) -> None:
    code, out, err = call("setup", "hosts.txt")
    assert (code, err) == (0, "Looking at mac0, mac1\n")
    for commands in PAIR:
        for command in commands:
            assert f"    sudo {command}\n" in out
    assert "Thunderbolt mesh of 2 Macs, 1 cable: RDMA (jaccl)\n  mac0 port 1 (en2) - mac1 port 1 (en2)  80 Gb/s" in out
    assert "mac1 ip=10.0.0.2 rdma=rdma_en2,- memory=64000000000" in out
    assert "Nothing was changed. --apply runs 6 commands." in out
    assert [mac.commands for mac in pair] == [[], []]
    assert not record_path().exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts.txt", "mac0", "mac1", "ssh_config"]


def test_apply_restart_and_undo(call: Call, pair: list[FakeMac]) -> None:
    before = [mac.interfaces for mac in pair]
    words = ("--apply", "--yes", "--no-sleep", "--wired-limit", "100GiB")
    settings = ["pmset -c sleep 0", "sysctl iogpu.wired_limit_mb=102400"]
    code, out, err = call("setup", "hosts.txt", *words, "-o", "new.txt")
    assert (code, "10 commands run" in out) == (0, True), err
    assert [mac.commands for mac in pair] == [[*commands, *settings] for commands in PAIR]
    assert ["inet 192.168.0.1 netmask 0xfffffffc" in mac.interfaces["en2"] for mac in pair] == [True, False]
    assert [is_up(mac) for mac in pair] == [(False, True), (False, True)]
    assert " sleep 0\n" in pair[0].says("pmset")
    assert "iogpu.wired_limit_mb: 102400\n" in pair[0].says("sysctl")
    assert read_hosts("new.txt").hosts == (
        Host("mac0", ips=("10.0.0.1",), rdma=(None, "rdma_en2")),
        Host("mac1", ips=("10.0.0.2",), rdma=("rdma_en2", None), memory_bytes=64 * 10**9),
    )
    assert stat.S_IMODE(record_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(record_path().parent.stat().st_mode) == 0o700
    assert [left.done for left in read_record()] == [True] * 10

    code, out, _ = call("setup", "new.txt", *words)  # from what it wrote itself
    assert (code, "Nothing had to be changed." in out) == (0, True)
    pair[0].restart(0)
    code, out, _ = call("setup", "new.txt", *words)
    assert (code, "3 commands run" in out, len(read_record())) == (0, True, 10)

    pair[1].restart(1)
    code, out, err = call("setup", "--undo", "--yes")
    assert (code, out) == (0, "9 commands run: what setup had changed is undone.\n"), err
    assert "left out: en2 does not have 192.168.0.2 any more" in err
    back = ["sysctl iogpu.wired_limit_mb=0", "pmset -c sleep 10"]
    assert pair[0].commands == [*PAIR[0], *settings, *PAIR[0], *back, *UNDO[0]]
    assert pair[1].commands == [*PAIR[1], *settings, *back, UNDO[1][0], UNDO[1][2]]
    assert [mac.interfaces for mac in pair] == before
    assert " sleep 10\n" in pair[0].says("pmset")
    assert not record_path().exists()
    assert call("setup", "--undo", "--yes")[:2] == (0, "There is nothing to undo.\n")


def test_what_a_restart_loses_is_run_again_without_a_question(call: Call, pair: list[FakeMac], sshd: Server) -> None:
    assert call("setup", "--again") == (0, "Nothing that setup did is lost.\n", "")
    words = ("--apply", "--yes", "--no-sleep", "--wired-limit", "100GiB")
    assert call("setup", "hosts.txt", *words)[0] == 0
    before, record = [mac.interfaces for mac in pair], record_path().read_bytes()
    assert call("setup", "--again", "-q") == (0, "", "")  # nothing is lost yet
    for number, mac in enumerate(pair):
        mac.restart(number)
        (mac.directory / "sudo.log").unlink()
    limit = pair[0].directory / "says" / "sysctl"
    limit.write_text(limit.read_text().replace("wired_limit_mb: 102400", "wired_limit_mb: 0"))
    pair[1].change(password="secret")

    code, out, err = call("setup", "--again")  # as a service: no terminal; mac0 gets its part all the same
    assert (code, out) == (3, "")
    assert pair[0].commands == [*PAIR[0], "sysctl iogpu.wired_limit_mb=102400"]
    assert pair[0].interfaces == before[0]
    assert "1 of 2 hosts failed: mac1." in err
    # The line that the hint gives lets sudo run these and no others; `=` is escaped as sudoers(5) asks for.
    assert (
        "Hint: run it at a terminal; or, on that Mac: sudo visudo -f /etc/sudoers.d/moectl, and in that file: " in err
    )
    assert (
        "%admin ALL=(root) NOPASSWD: /sbin/ifconfig bridge0 down, "
        "/sbin/ifconfig en2 inet 192.168.0.2 netmask 255.255.255.252, "
        "/sbin/route change 192.168.0.1 -interface en2, /usr/sbin/sysctl iogpu.wired_limit_mb\\=102400, then" in err
    )
    pair[1].change(password="")
    assert call("setup", "--again")[:2] == (0, "3 commands run again.\n")
    assert [mac.interfaces for mac in pair] == before
    assert record_path().read_bytes() == record  # --undo still takes all back
    assert call("setup", "--again", "--apply")[0] == 2

    sshd.add_alias("gone", port=1)
    with open_record() as found:
        found.finish(found.begin(entry("gone")))
    pair[0].restart(0)
    pair[0].change(fails="route change")
    code, _, err = call("setup", "--again")
    assert (code, is_up(pair[0])) == (3, (False, True))  # a host that is away keeps no other one from its part
    assert "goes on without: route: ioctl" in err


def test_what_was_run_before_a_failure_is_undone_and_nothing_else(call: Call, pair: list[FakeMac]) -> None:
    pair[1].change(fails="ifconfig en2 inet")
    code, out, err = call("setup", "hosts.txt", "--apply", "--yes", "-o", "new.txt")
    assert (code, out) == (6, "")
    assert "Error: mac1: sudo ifconfig en2 inet 192.168.0.2 netmask … failed: exit code 1: ifconfig: ioctl" in err
    assert "(4 of 6 commands were run)" in err
    assert "Hint: moectl setup --undo takes back what was run" in err
    assert not Path("new.txt").exists()
    assert len(read_record()) == 4

    code, out, _ = call("setup", "--undo", "--dry-run")
    assert (code, out.splitlines()[:2]) == (0, ["mac1", "  sudo ifconfig bridge0 up"])
    # What cannot be undone stays in the record, and hides no other host.
    pair[1].change(fails="bridge0 up")
    code, _, err = call("setup", "--undo", "--yes")
    assert (code, "not everything was undone: mac1: sudo ifconfig bridge0 up failed" in err) == (3, True)
    assert pair[0].commands[3:] == UNDO[0]
    assert [(left.host, left.argv) for left in read_record()] == [("mac1", ("ifconfig", "bridge0", "down"))]
    pair[1].change(fails="")
    assert call("setup", "--undo", "--yes", "--hosts", "mac0")[1] == "There is nothing to undo.\n"
    code, out, err = call("setup", "--undo", "--yes", "--hosts", "mac1")
    assert (code, out) == (0, "1 command run: what setup had changed is undone.\n"), err
    assert pair[1].commands == [*PAIR[1][:2], "ifconfig bridge0 up", "ifconfig bridge0 up"]
    assert not record_path().exists()


def test_a_connection_that_is_lost_leaves_the_command_in_the_record(call: Call, pair: list[FakeMac]) -> None:
    pair[0].change(cut_at="inet 192.168.0.1 netmask")
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert (code, "the connection was lost" in err) == (5, True), err
    assert [(left.argv[:2], left.done) for left in read_record()] == [
        (("ifconfig", "bridge0"), True),
        (("ifconfig", "en2"), False),
    ]
    code, out, err = call("setup", "--undo", "--yes")
    assert (code, "what setup had changed is undone" in out) == (0, True), err
    assert is_up(pair[0]) == (True, False)
    assert pair[1].commands == []


def test_a_route_stops_nothing_and_a_command_without_effect_is_told(call: Call, pair: list[FakeMac]) -> None:
    pair[0].change(fails="route change")
    tool = pair[1].directory / "usr" / "bin" / "route"  # it runs last: the address is gone again when it has
    tool.write_text(f"#!/bin/sh\nexec {pair[1].directory}/usr/bin/ifconfig en2 inet 192.168.0.2 delete\n")
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert "goes on without: " in err
    assert (code, "1 of the commands succeeded but had no effect: mac1: ifconfig en2 inet 192.168.0.2" in err) == (
        3,
        True,
    )
    assert len(read_record()) == 5


def test_a_hosts_file_is_never_overwritten_silently(call: Call, pair: list[FakeMac]) -> None:
    code, _, err = call("setup", "hosts.txt", "-o", "hosts.txt", "--apply", "--yes")
    assert (code, "hosts.txt is there already" in err) == (2, True)
    assert pair[0].commands == []
    code, out, _ = call("setup", "hosts.txt", "-o", "new.json", "--json")
    assert (code, json.loads(out)["written"], json.loads(out)["commands_run"]) == (0, "new.json", 0)
    assert json.loads(Path("new.json").read_text())["backend"] == "jaccl"
    assert call("setup", "new.json", "-o", "hosts.txt", "--force")[0] == 0
    assert read_hosts("hosts.txt").hosts == read_hosts("new.json").hosts


class Typed(io.StringIO):
    """What a person types at a terminal."""

    def isatty(self) -> bool:
        return True


def test_it_asks_first(call: Call, pair: list[FakeMac], monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("--apply", "--undo"):
        code, _, err = call("setup", "hosts.txt", flag)
        assert (code, f"{flag} asks before it changes anything" in err, "--yes" in err) == (2, True, True)
    monkeypatch.setattr(sys, "stdin", Typed("n\n"))
    code, out, err = call("setup", "hosts.txt", "--apply", "-o", "new.txt")
    assert (code, out) == (0, "")
    assert "Run 6 commands as root on mac0, mac1? [y/N]" in err
    assert "Nothing was changed." in err
    assert [mac.commands for mac in pair] == [[], []]
    assert not Path("new.txt").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--undo", "--apply"), 2, "--undo and --apply exclude each other"),
        (("--dry-run", "--apply"), 2, "--dry-run and --apply exclude each other"),
        (("--undo", "-o", "x"), 2, "--undo and --output exclude each other"),
        (("-o", "nowhere/new.txt"), 2, "nowhere is not a directory"),
        (("--wired-limit", "much"), 4, "'much' is not a size"),
        (("--wired-limit", "auto"), 8, "there is no shard set for 1 hosts"),
    ],
)
def test_flags_that_make_no_sense(words: tuple[str, ...], code: int, message: str, call: Call, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("localhost\n")
    found, _, err = call("setup", "hosts.txt", *words)
    assert (found, message in err) == (code, True), err


def test_hosts_that_are_no_macs(call: Call, sshd: Server, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text(f"{sshd.add_alias('box')} ip=10.0.0.9\nlocalhost ip=10.0.0.8\n")
    code, out, err = call("setup", "hosts.txt", "--apply", "--yes", "-o", "new.txt")
    assert (code, "Nothing had to be changed." in out) == (0, True), err
    assert "note  box, localhost: not a Mac: there is nothing to set up" in out
    assert [host.ips for host in read_hosts("new.txt").hosts] == [("10.0.0.9",), ("10.0.0.8",)]
    code, _, err = call("setup", "hosts.txt", "--backend", "jaccl")
    assert (code, "box, localhost: no Mac" in err) == (4, True)


def test_a_host_that_is_not_reached(call: Call, pair: list[FakeMac], sshd: Server, tmp_path: Path) -> None:
    sshd.add_alias("gone", port=1)
    (tmp_path / "hosts.txt").write_text("mac0\ngone\n")
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert (code, "gone" in err) == (5, True)
    assert pair[0].commands == []


def test_a_host_that_is_gone_keeps_its_part_of_the_record(call: Call, pair: list[FakeMac], sshd: Server) -> None:
    sshd.add_alias("gone", port=1)
    with open_record() as found:
        for host in ("gone", "mac1"):
            found.finish(found.begin(entry(host)))
    code, _, err = call("setup", "--undo", "--yes")
    assert (code, "not everything was undone: gone: " in err) == (3, True), err
    assert pair[1].commands == ["ifconfig bridge0 up"]
    assert [left.host for left in read_record()] == ["gone"]
    assert call("setup", "--undo", "--yes")[0] == 5


def test_only_the_hosts_that_are_named_are_undone(call: Call, pair: list[FakeMac], tmp_path: Path) -> None:
    with open_record() as found:
        for host in ("mac0", "mac1"):
            found.finish(found.begin(entry(host)))
    (tmp_path / "one.txt").write_text("mac1\n")
    assert call("setup", "--undo", "--yes", "--hostfile", "one.txt")[0] == 0
    assert [mac.commands for mac in pair] == [[], ["ifconfig bridge0 up"]]
    assert [left.host for left in read_record()] == ["mac0"]


def test_who_comes_in_by_the_bridge_is_stopped(call: Call, pair: list[FakeMac]) -> None:
    (pair[1].directory / "interfaces" / "lo0").unlink()
    bridge = pair[1].directory / "interfaces" / "bridge0"
    bridge.write_text(bridge.read_text().replace("169.254.205.255", "127.0.0.1"))
    code, out, _ = call("setup", "hosts.txt")
    assert (code, "stop  mac1: SSH reaches it by bridge0 (127.0.0.1), which would be changed under it" in out) == (
        0,
        True,
    )
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert (code, "Hint: use its Ethernet or Wi-Fi address" in err) == (4, True)
    assert [mac.commands for mac in pair] == [[], []]


def test_sudo_that_wants_a_password(call: Call, pair: list[FakeMac], tmp_path: Path) -> None:
    for mac in pair:
        mac.change(password="open sesame")
    code, _, err = call("setup", "hosts.txt", "--apply", "--yes")
    assert (code, "mac0: sudo asks for a password, and standard input is no terminal" in err) == (5, True)
    words = [sys.executable, "-m", "moectl", "setup", "hosts.txt", "--apply"]
    with Terminal(words, tmp_path) as terminal:
        terminal.wait_for("as root on mac0, mac1? [y/N]")
        terminal.type("y\r")
        terminal.wait_for("Password for sudo on mac0, mac1")
        terminal.type("wrong\r")
        terminal.wait_for("Error: mac0: sudo was refused: sudo: 1 incorrect password attempt")
        assert terminal.end() == 5
    assert [mac.commands for mac in pair] == [[], []]
    with Terminal([*words, "-y"], tmp_path) as terminal:
        terminal.wait_for("Password for sudo")
        terminal.type("open sesame\r")
        terminal.wait_for("6 commands run")
        assert terminal.end() == 0
        assert b"sesame" not in terminal.sent
    assert [mac.commands for mac in pair] == PAIR
    assert "sesame" not in record_path().read_text()


# The record.


def entry(host: str = "mac1", *argv: str) -> RecordedCommand:
    return RecordedCommand(0, host, argv or ("ifconfig", "bridge0", "down"), ("ifconfig", "bridge0", "up"))


def test_a_torn_line_is_left_out_and_a_damaged_one_is_told(call: Call) -> None:
    with open_record() as found:
        found.finish(found.begin(entry()))
        found.begin(entry("mac2"))
    whole = record_path().read_bytes()
    record_path().write_bytes(whole + b'{"begin": 3, "ho')
    assert [(e.number, e.host, e.done) for e in read_record()] == [(1, "mac1", True), (2, "mac2", False)]
    with open_record() as found:
        assert found.begin(entry("mac1")) == 1
        assert found.begin(entry("mac3")) == 3
    assert [e.host for e in read_record()] == ["mac1", "mac2", "mac3"]
    record_path().write_bytes(whole + b'{"begin": "x"}\n')
    code, _, err = call("setup", "--undo", "--yes")
    assert (code, "setup.jsonl is damaged" in err) == (8, True)


def test_two_setups_do_not_share_a_record() -> None:
    with open_record() as found:
        found.begin(entry())
        with pytest.raises(StateError, match="another moectl setup is running"), open_record():
            pass
    with open_record() as found:
        found.forget(1)
    assert not record_path().exists()


def test_what_the_hints_about_its_files_say_is_done(
    call: Call, pair: list[FakeMac], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.txt").write_text("mine")
    code, _, err = call("setup", "hosts.txt", "-o", "there.txt")
    assert (code, "Hint: choose another name, or --force to overwrite it\n" in err) == (2, True)
    for words in (("-o", "other.txt"), ("-o", "there.txt", "--force")):
        assert call("setup", "hosts.txt", *words)[0] == 0
        assert [host.name for host in read_hosts(words[1]).hosts] == ["mac0", "mac1"]
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    with pytest.raises(StateError) as caught, open_record():
        pass
    assert caught.value.hint == "is XDG_STATE_HOME writable?"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with open_record() as found:
        found.begin(entry())
    assert record_path().is_relative_to(tmp_path / "state")
