"""`moectl service` from the command line: what it refuses, and what it asks of launchd, a fake with a memory."""

from __future__ import annotations

import json
import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moectl import __main__
from moectl.cluster.service import launchd
from moectl.cluster.service.job import record_path
from moectl.hosts.hostfile import Host
from moectl.server.background import SERVICE, log_path
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from tests.support.mac_tools import write_launchd, write_script
from tests.support.sshd import Server, make_key

Call = Callable[..., tuple[int, str, str]]
DEMO = ("--demo", "--local", "1")
# launchd.plist(5) of macOS 15, the keys that are used here, and the type of each.
KEYS = {
    "Label": str, "ProgramArguments": list, "EnvironmentVariables": dict, "WorkingDirectory": str, "RunAtLoad": bool,
    "KeepAlive": dict, "ThrottleInterval": int, "ExitTimeOut": int, "ProcessType": str, "StandardOutPath": str,
    "StandardErrorPath": str, "UserName": str,
}  # fmt: skip


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Run the command line in this process, without a terminal; return exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(sys, "stdin", None)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moectl", "service", *words])
        code = __main__.run()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This machine as a Mac, as far as a service goes; its user is logged in at the screen."""
    directory = tmp_path / "mac"
    programs = write_launchd(directory)
    (directory / "screen").touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    monkeypatch.setattr(launchd, "DAEMONS", tmp_path / "Library/LaunchDaemons")
    (tmp_path / "Library/LaunchDaemons").mkdir(parents=True)
    return directory


def calls(mac: Path) -> list[str]:
    log = mac / "launchctl.log"
    return [line for line in log.read_text().splitlines() if not line.startswith("print")] if log.exists() else []


# What is refused, before anything is written.


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("install", "--demo", "--api-key", "secret"), 2, "--api-key-file FILE"),
        (("install", "--demo", "--port", "0"), 2, "choose a --port"),
        (("install", "--demo", "--port", "x"), 2, "'x' is not a valid integer"),
        (("install", "--demo", "--hostfile", "-"), 2, "write a hosts file: --hostfile FILE"),
        (("install", "--demo", "--host", "0.0.0.0"), 2, "give --api-key or --api-key-file"),
        (("install", "--demo", "--api-key-file", "nothing"), 2, "nothing cannot be read"),
        (("install", "--demo", "--allow-origin", "*"), 2, "key"),
        (("install", "--detach"), 2, "No such option '--detach'"),
        (("install",), 8, "moectl deploy hosts.txt"),
        (("install", "--shards", "nothing"), 8, "nothing"),
        (("install", "--hosts", "a,b"), 8, "no model is deployed on a, b"),
        (("status", "--port", "1"), 2, "--port is for 'moectl service install', not for status"),
        (("remove", "--at", "boot"), 2, "--at is for"),
        (("start",), 8, "moectl service install"),
        (("halt",), 2, "is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_refused(call: Call, tmp_path: Path, words: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = call(*words)
    assert (found, out) == (code, "")
    assert said in err
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_the_hints_say_is_accepted(call: Call, tmp_path: Path) -> None:
    """Each refusal above names a hint; with what it says, the same command goes on."""
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "hosts.txt").write_text("a\n")
    (tmp_path / "moectl.toml").write_text("[serve]\ndetach = true\n")
    code, _, err = call("install", *DEMO, "-n")
    assert (code, "Hint: take detach out of the configuration of serve" in err) == (2, True)
    (tmp_path / "moectl.toml").unlink()
    for words in (("--api-key-file", "key"), ("--port", "9000"), ("--hostfile", "hosts.txt"), ()):
        assert call("install", *DEMO, "-n", *words)[0] == 0


def test_without_a_manager_of_ones_own_nothing_is_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script(tmp_path / "bin/systemctl", "echo 'Failed to connect to bus: No medium found' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    code, _, err = call("install", *DEMO)
    assert (code, "this login has no systemd of its own: Failed to connect to bus" in err) == (8, True)
    assert "log in at the machine or by ssh; su and sudo start none" in err
    monkeypatch.setenv("PATH", f"{tmp_path}/nothing")
    code, _, err = call("install", *DEMO)
    assert (code, "there is no systemd on this machine" in err) == (8, True)
    assert "'moectl service install --dry-run' shows as ExecStart" in err  # the hint, which works:
    assert "ExecStart=" in call("install", *DEMO, "--dry-run")[1]
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_at_boot_a_user_has_to_linger(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for systemd, as logind is not here: it says what it was asked."""
    log = tmp_path / "log"
    write_script(tmp_path / "bin/systemctl", f'echo "$*" >>{log}\n')
    write_script(
        tmp_path / "bin/loginctl",
        f'echo "loginctl $*" >>{log}\n[ "$1" != show-user ] || echo "Linger=$(cat {tmp_path}/linger)"\n'
        f'[ "$1" != enable-linger ] || {{ [ -e {tmp_path}/may ] || {{ echo "Access denied" >&2; exit 1; }}; '
        f"echo yes >{tmp_path}/linger; }}\n",
    )
    (tmp_path / "linger").write_text("no\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    code, _, err = call("install", "--at", "boot", *DEMO)
    assert (code, "services of this user cannot start at boot: Access denied" in err) == (8, True)
    assert "Hint: sudo loginctl enable-linger root, then the same again; or --at login" in err
    assert not (tmp_path / ".config").exists()
    (tmp_path / "may").touch()  # as after the hint
    assert call("install", "--at", "boot", *DEMO)[0] == 0
    unit = tmp_path / ".config/systemd/user/moectl.service"
    assert log.read_text().splitlines()[-3:] == [
        "--user daemon-reload", "--user enable moectl.service", "--user restart --no-block moectl.service",
    ]  # fmt: skip
    code, _, err = call("remove")
    assert (code, unit.exists(), "loginctl disable-linger" in err) == (0, False, True)


def test_an_installation_that_fails_leaves_what_was_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script(tmp_path / "bin/systemctl", '[ "$2" != enable ] || { echo "Read-only file system" >&2; exit 1; }\n')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    unit = tmp_path / ".config/systemd/user/moectl.service"
    code, _, err = call("install", *DEMO)
    assert (code, "systemctl --user enable moectl.service failed: Read-only file system" in err) == (6, True)
    assert not unit.exists()
    assert not record_path().exists()
    unit.write_text("[Service]\nExecStart=/mine\n")
    assert call("install", *DEMO, "--yes")[0] == 6
    assert unit.read_text() == "[Service]\nExecStart=/mine\n"


def test_the_flags_become_absolute_and_those_of_variables_are_kept(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "moectl.toml").write_text("[serve]\nmax_restarts = 9\n")
    monkeypatch.setenv("MOECTL_SERVE_PORT", "9001")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, out, _ = call(
        "install", *DEMO, "--api-key-file", "key", "--allow-origin", "https://a.example", "-n", "--json"
    )
    document = json.loads(out)
    assert code == 0
    assert document["command"][1:] == [
        "serve", "--port", "9001", "--api-key-file", f"{tmp_path}/key", "--allow-origin", "https://a.example",
        "--max-restarts", "9", "--demo", "--local", "1",
    ]  # fmt: skip
    assert Path(document["command"][0]).is_absolute()
    assert "HF_HOME=/models" in document["file"]
    assert "secret" not in document["file"]


def test_only_an_agent_that_opens_a_host_is_warned_of(
    call: Call, sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_script(tmp_path / "bin/systemctl", "exit 0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    ranks = tuple(DeployedRank(Host(sshd.add_alias(name)), "/p", "/r", "/s") for name in ("node0", "node1"))
    write_deployment(Deployment("x", "shards", ranks))
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    assert call("install")[::2] == (0, "")
    assert os.environ["SSH_AUTH_SOCK"] == str(tmp_path / "agent")
    head, _, tail = sshd.config.read_text().rpartition(str(sshd.key))
    sshd.config.write_text(f"{head}{make_key(tmp_path / 'other')}{tail}")  # no key that node1 knows
    err = call("install", "--yes", "--port", "9000")[2]
    assert "Warning: only the ssh agent of this login opens node1, and the service may have none." in err


def test_a_log_that_has_grown_long_begins_again(tmp_path: Path) -> None:
    """By a process whose standard error it is, as launchd and systemd open it."""
    log = log_path(SERVICE)
    log.parent.mkdir(parents=True)
    code = "from moectl.server.background import bound_log; bound_log(); import sys; print('new', file=sys.stderr)"
    for before, after in ((10, 10 + len("new\n")), (1_000_001, len("new\n"))):
        log.write_text("x" * before)
        with log.open("ab") as f:
            subprocess.run([sys.executable, "-c", code], stderr=f, check=True)
        assert log.stat().st_size == after


# launchd.


def check_plist(content: bytes, path: Path) -> dict[str, object]:
    """Check a property list as launchd.plist(5) describes it, and by `plutil -lint` where there is one."""
    found: dict[str, object] = plistlib.loads(content)
    assert {key: type(value) for key, value in found.items()} == {key: KEYS[key] for key in found}
    if shutil.which("plutil"):
        path.write_bytes(content)
        subprocess.run(["plutil", "-lint", str(path)], check=True, capture_output=True)
    return found


def test_an_agent_at_login(call: Call, mac: Path, tmp_path: Path) -> None:
    path = tmp_path / "Library/LaunchAgents/moectl.serve.plist"
    code, out, err = call("install", *DEMO, "--port", "9000")
    assert (code, err) == (0, "")
    assert f"Installed in {path}." in out
    found = check_plist(path.read_bytes(), tmp_path / "lint.plist")
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert "UserName" not in found
    assert calls(mac) == [f"enable gui/{os.getuid()}/moectl.serve", f"bootstrap gui/{os.getuid()} {path}"]

    told = f"gui/0/moectl.serve = {{\n\tstate = running\n\truns = 2\n\tpid = {os.getpid()}\n\tlast exit code = 5\n}}\n"
    (mac / "says/launchctl").write_text(told)
    code, out, _ = call("status")
    assert out.startswith("running   http://127.0.0.1:9000/v1  (launchd, at login)  pid ")
    assert "nothing has changed" in call("install", *DEMO, "--port", "9000")[1]

    (mac / "says/launchctl").write_text("\tstate = spawn scheduled\n\truns = 2\n\tlast exit code = 5: EIO\n")
    code, out, _ = call("status")
    assert out.startswith("waiting ")
    assert "It ended with 5 (host unreachable, key or login)." in out
    assert "It is started again every 30 s. 'moectl logs controller' says more." in out

    code, _, err = call("install", *DEMO, "--port", "9001")
    assert (code, "use --yes to replace it" in err) == (2, True)
    code, out, _ = call("install", *DEMO, "--port", "9001", "--yes")
    assert (code, "Installed again" in out) == (0, True)
    assert calls(mac)[2:] == [
        f"bootout gui/{os.getuid()}/moectl.serve", *(line for line in calls(mac)[:2]),
    ]  # fmt: skip

    (mac / "loaded").unlink()  # moectl stop, and a new login
    assert "To start it, moectl service start" in call("status")[1]
    assert call("start")[0] == 0
    assert call("start")[1] == "The service runs already.\n"
    assert call("remove")[1] == f"The service has ended, and {path} is removed.\n"
    assert (path.exists(), (mac / "loaded").exists(), record_path().exists()) == (False, False, False)
    assert call("remove")[1] == "No service is installed.\n"


def test_over_ssh_an_agent_waits_for_the_screen(call: Call, mac: Path, tmp_path: Path) -> None:
    (mac / "screen").unlink()
    code, _, err = call("install", *DEMO)
    assert (code, "It starts at the next login at this Mac's screen" in err) == (0, True)
    assert calls(mac) == []
    assert (tmp_path / "Library/LaunchAgents/moectl.serve.plist").exists()


def test_an_agent_that_launchd_refuses_is_not_left_behind(call: Call, mac: Path, tmp_path: Path) -> None:
    (mac / "fails_to_start").write_text("Bootstrap failed: 5: Input/output error")
    code, _, err = call("install", *DEMO)
    assert (code, "Bootstrap failed: 5" in err) == (6, True)
    assert not (tmp_path / "Library/LaunchAgents/moectl.serve.plist").exists()


def test_a_daemon_at_boot_asks_before_it_is_root(call: Call, mac: Path, tmp_path: Path) -> None:
    path = tmp_path / "Library/LaunchDaemons/moectl.serve.plist"
    code, _, err = call("install", "--at", "boot", *DEMO)
    assert (code, "use --yes to skip the question" in err) == (2, True)
    (mac / "password").write_text("secret\n")
    code, _, err = call("install", "--at", "boot", *DEMO, "--yes")
    assert (code, "run the commands of the dry run by hand" in err) == (5, True)
    shown = call("install", "--at", "boot", *DEMO, "--dry-run")[1]
    assert f"  sudo launchctl bootstrap system {path}\n" in shown
    assert not path.exists()
    (mac / "password").write_text("")
    code, out, _ = call("install", "--at", "boot", *DEMO, "--yes")
    assert (code, f"Installed in {path}." in out) == (0, True)
    assert check_plist(path.read_bytes(), tmp_path / "lint.plist")["UserName"] == "root"
    assert path.stat().st_mode & 0o777 == 0o644
    assert calls(mac) == ["enable system/moectl.serve", f"bootstrap system {path}"]
    # What was shown is what was run.
    ran = [f"  sudo {line}" for line in (mac / "sudo.log").read_text().splitlines()]
    assert ran == [line for line in shown.splitlines() if line.startswith("  sudo ")]
    assert call("install", *DEMO, "--yes")[0] == 0  # from boot to login
    assert not path.exists()
    assert (tmp_path / "Library/LaunchAgents/moectl.serve.plist").exists()


def test_a_service_of_root_on_a_mac_is_refused(call: Call, mac: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code, _, err = call("install", *DEMO)
    assert (code, "Hint: run it as yourself, without sudo: it asks for what it needs" in err) == (8, True)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    assert call("install", *DEMO)[0] == 0


def test_launchd_s_command_is_moectl_itself(tmp_path: Path) -> None:
    """The shell passes the words on as they were given, and is gone then: launchd's SIGTERM reaches `serve`."""
    from moectl.cluster.service.job import ServiceJob

    program = tmp_path / "moe ctl"
    write_script(program, 'echo "$$ $PPID $#"; for word; do printf "%s|" "$word"; done; [ "$1" != setup ] || exit 5\n')
    job = ServiceJob("login", (str(program),), ("a b", "$HOME", "it's", '"', "%"), {}, "/log", "http://127.0.0.1:1/v1")
    words = plistlib.loads(launchd.Launchd().render(job))["ProgramArguments"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    first, second, third = child.communicate()[0].split("\n")
    assert second.startswith("setup|--again|--quiet|")
    assert second.removeprefix("setup|--again|--quiet|") == f"{child.pid} {os.getpid()} 6"
    assert third == "serve|a b|$HOME|it's|\"|%|"
    assert first.split()[1] == str(child.pid)
