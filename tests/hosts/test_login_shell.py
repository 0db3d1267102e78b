"""Login shells of hosts: whichever shell an account has, whatever it prints: commands get through, or it is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.cluster.doctor.finding import Finding, Level
from moectl.cluster.doctor.host import Expected, Visit, visit_host
from moectl.errors import CommandFailed
from moectl.hosts.hostfile import Host
from moectl.hosts.login_shell import NOISE_BYTES
from moectl.hosts.ssh.remote import SSHRemote
from tests.support.sshd import SSHD, run_sshd

pytestmark = pytest.mark.skipif(SSHD is None, reason="OpenSSH (sshd) is not installed")

DEMO = Path(__file__).parent.parent.parent / "moectl/demo/moectl-demo"
SHELLS = ("bash", "zsh", "csh", "tcsh", "fish")
SCRIPT = 'printf \'%s\\n\' "a!b $1"\nfor i in 1 2; do\n  echo "line $i \\\\"\ndone'
FILES = {
    "zsh": ".zshenv",
    "tcsh": ".tcshrc",
    "fish": ".config/fish/config.fish",
}


def find_shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def log_in_with(shell: str, home: Path) -> tuple[str, ...]:
    """Return the lines of an sshd that runs every command in this shell, as if it were the account's."""
    variables = f"SetEnv HOME={home} SHELL={shell} XDG_CONFIG_HOME={home}/.config"
    return f'ForceCommand exec {shell} -c "$SSH_ORIGINAL_COMMAND"', variables


def visit(host: Host) -> dict[str, Finding]:
    remote = SSHRemote(host)
    seen = Visit(host, 0, remote)
    visit_host(seen, Expected())
    remote.close()
    return {finding.check: finding for finding in seen.findings}


@pytest.mark.parametrize("name", SHELLS)
def test_commands_reach_every_login_shell(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = find_shell(name)
    (tmp_path / "home").mkdir()
    with run_sshd(tmp_path / "sshd", *log_in_with(shell, tmp_path / "home")) as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        remote = SSHRemote(Host(server.add_alias("node0")))
        done = remote.run(["sh", "-c", SCRIPT, "sh", "'c' `d` *\n!!"])
        assert done.stdout == b"a!b 'c' `d` *\n!!\nline 1 \\\nline 2 \\\n"
        assert (done.noise, done.stderr) == (b"", b"")
        with pytest.raises(CommandFailed, match="not found"):
            remote.run(["no-such-program"])
        remote.close()
        found = visit(Host("node0", python=sys.executable, dir=str(tmp_path / "root")))
    assert found["ssh"].level is found["python"].level is Level.OK


@pytest.mark.parametrize("name", ["zsh", "tcsh", "fish"])  # bash: see test_a_noisy_bashrc
def test_doctor_names_the_file_that_prints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell, home = find_shell(name), tmp_path / "home"
    file = home / FILES[name]
    file.parent.mkdir(parents=True)
    file.write_text("echo Welcome home\n")
    with run_sshd(tmp_path / "sshd", *log_in_with(shell, home)) as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        host = Host(server.add_alias("node0"), python=sys.executable, dir=str(tmp_path / "root"))
        noisy = visit(host)
        fix = noisy["noise"].fix or ""
        assert f"~/{FILES[name]}" in fix
        if name == "zsh":
            file.rename(home / ".zshrc")
        else:
            file.write_text(f"{fix.split('prints: ')[1]}\necho Welcome home\n")
        mended = visit(host)
    assert noisy["noise"].text == "its shell prints on stdout without a terminal: 'Welcome home'"
    assert noisy["ssh"].level is noisy["python"].level is Level.OK
    assert "noise" not in mended


@pytest.mark.parametrize("said", ["This account is currently not available.", ""])
def test_a_shell_that_runs_nothing_is_named(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_sshd(tmp_path / "sshd", f"ForceCommand echo '{said}'; exit 1") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        host = Host(server.add_alias("node0"))
        remote = SSHRemote(host)
        with pytest.raises(CommandFailed) as caught:
            remote.run(["true"], check=False)
        process = remote.start(["cat"])
        if said:
            with pytest.raises(OSError, match=f"its login shell does not run commands: {said}"):
                process.stdout.read()
        assert process.stdout.read().strip() == b""
        process.close()
        remote.close()
        found = visit(host)
    assert caught.value.message == f"its login shell does not run commands: {said or 'exit code 1'}"
    assert "chsh" in (caught.value.hint or "")
    assert found["shell"].text == f"its login shell does not run a command: {said or 'exit code 1'}"


def test_a_shell_that_prints_without_end_is_not_heard_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_sshd(tmp_path / "sshd", "ForceCommand yes moectl") as server:
        monkeypatch.setenv("MOECTL_SSH_CONFIG", str(server.config))
        remote = SSHRemote(Host(server.add_alias("node0")))
        with pytest.raises(CommandFailed, match="its login shell does not run commands"):
            remote.run(["true"], timeout_s=None)
        process = remote.start(["cat"])
        with pytest.raises(OSError, match="its login shell does not run commands"):
            process.stdout.read()
        process.close()
        remote.close()


@pytest.mark.parametrize(
    ("ip", "size"),
    [
        ("", NOISE_BYTES - 10),
        pytest.param("", 40, marks=pytest.mark.long),
        pytest.param(" ip=127.0.0.1", 40, marks=pytest.mark.long),
        pytest.param(" ip=127.0.0.1", NOISE_BYTES - 10, marks=pytest.mark.long),
    ],
)
def test_a_model_runs_on_a_host_whose_shell_prints(ip: str, size: int, tmp_path: Path) -> None:
    noise = tmp_path / "motd"
    noise.write_text("*" * size)
    command = f'ForceCommand cat {noise}; exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    with run_sshd(tmp_path / "sshd", command) as server:
        hosts = tmp_path / "hosts.txt"
        hosts.write_text(f"{server.add_alias('node0')} python={sys.executable} dir={tmp_path}/node{ip}\n")
        env = {**os.environ, "MOECTL_SSH_CONFIG": str(server.config)}

        def moectl(*argv: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "moectl", *argv], env=env, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        moectl("shard", str(DEMO), "--nodes", "1", "-o", str(tmp_path / "set"), "--no-canary")
        moectl("deploy", str(hosts), "--shards", str(tmp_path / "set"))
        assert moectl("run", "--keep-alive", "0", "--max-tokens", "8", "What is expert parallelism?").strip()
