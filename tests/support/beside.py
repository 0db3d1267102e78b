"""The real ssh beside moectl: both have to come to the same verdict, or moectl says by name what it does not do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from moectl.errors import MoectlError
from moectl.hosts.hostfile import Host
from moectl.hosts.ssh.remote import SSHRemote
from tests.support.sshd import Server


def ask_ssh(config: Path, alias: str) -> subprocess.CompletedProcess[str]:
    """Run a command on a host with ssh, which may ask nothing."""
    return subprocess.run(
        ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", alias, "echo OK"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def ask_moectl(config: Path, alias: str) -> MoectlError | None:
    """Run a command on a host with moectl; return what it raised."""
    remote = SSHRemote(Host(alias), config=str(config))
    try:
        assert remote.run(["echo", "OK"]).stdout == b"OK\n"
    except MoectlError as error:
        return error
    finally:
        remote.close()
    return None


def compare(server: Server, alias: str, keyword: str = "") -> MoectlError | None:
    """Demand the same verdict, or a refusal that names the keyword; return moectl's error."""
    done, error = ask_ssh(server.config, alias), ask_moectl(server.config, alias)
    if done.returncode == 0 and error is not None:
        assert keyword, f"ssh gets in: {error} ({error.hint})"
        assert keyword.lower() in f"{error} {error.hint}".lower(), f"ssh gets in: {error} ({error.hint})"
    if error is None:
        assert done.returncode == 0, f"moectl gets in, ssh does not: {done.stderr}"
    return error


def both_get_in(server: Server, alias: str) -> None:
    assert compare(server, alias) is None, ask_ssh(server.config, alias).stderr


def both_refuse(server: Server, alias: str) -> MoectlError:
    error = compare(server, alias)
    assert error is not None
    assert ask_ssh(server.config, alias).returncode != 0
    return error


def usual(server: Server, key: Path | str, *lines: str) -> tuple[str, ...]:
    """Return the lines of an alias that has only this IdentityFile; `lines` come first."""
    named = {line.split()[0] for line in lines}
    plain = (
        "HostName 127.0.0.1",
        f"Port {server.port}",
        f"User {server.user}",
        f"IdentityFile {key}",
        "IdentitiesOnly yes",
        "IdentityAgent none",
        f"UserKnownHostsFile {server.known_hosts}",
        "GlobalKnownHostsFile none",
    )
    return (*lines, *(line for line in plain if line.split()[0] not in named or line.startswith("IdentityFile")))


@contextlib.contextmanager
def run_agent(*keys: Path) -> Iterator[Path]:
    """Run an ssh-agent that holds these keys until the block ends; yield its socket."""
    path = Path("/tmp") / f"moectl-agent-{os.getpid()}-{time.monotonic_ns()}"  # a socket's path has to be short
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if path.exists():
                break
            time.sleep(0.01)
        for key in keys:
            environ = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            subprocess.run(["ssh-add", "-q", str(key)], env=environ, check=True, capture_output=True)
        yield path
    finally:
        agent.terminate()
        agent.wait()
        path.unlink(missing_ok=True)


def sign(authority: Path, public: Path, *options: str) -> Path:
    """Sign a public key with ssh-keygen; return the certificate's path."""
    subprocess.run(["ssh-keygen", "-q", "-s", str(authority), "-I", "id", *options, str(public)], check=True)
    return public.with_name(public.name.removesuffix(".pub") + "-cert.pub")


def fingerprint_line(path: Path) -> str:
    """Return the type and the key of a .pub file."""
    return " ".join(path.read_text().split()[:2])
