"""A real OpenSSH server on localhost for the tests: free port, throw-away keys, its own ssh configuration.

It runs as root and as an ordinary user (then one logs in as oneself, which sshd allows). It is no fake: what
the tests see of SSH is what users will see.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)


@dataclass(frozen=True)
class Server:
    """A running sshd. `config` is an ssh configuration in which each alias of `add_alias` reaches it."""

    directory: Path
    port: int
    user: str
    key: Path
    host_key: Path
    known_hosts: Path
    config: Path
    process: subprocess.Popen[bytes]

    def count_logins(self) -> int:
        """Return how many logins it has accepted so far."""
        return (self.directory / "sshd.log").read_text().count("Accepted publickey for")

    def add_alias(self, alias: str, *lines: str, port: int | None = None, base: bool = True) -> str:
        """Add `Host alias` to the configuration, with `lines` before the usual ones; return the alias."""
        usual = [
            "HostName 127.0.0.1",
            f"Port {port or self.port}",
            f"User {self.user}",
            f"IdentityFile {self.key}",
            "IdentitiesOnly yes",
            "IdentityAgent none",
            f"UserKnownHostsFile {self.known_hosts}",
            "GlobalKnownHostsFile none",
        ]
        # OpenSSH takes the first value of an option: what a test says comes first.
        text = "\n  ".join([f"Host {alias}", *lines, *(usual if base else [])])
        with self.config.open("a") as f:
            f.write(text + "\n")
        return alias


def make_key(path: Path, passphrase: str = "") -> Path:
    """Make an ed25519 key pair; return the private key's path."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", path.name, "-f", str(path)], check=True
    )
    path.chmod(0o600)
    return path


def find_free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def server_config(directory: Path, address: str, port: int, host_key: Path, authorized: Path) -> str:
    """Return an sshd_config that trusts one authorized_keys file and nothing else; sessions have a home of their own.

    What the shell of whoever runs the tests does at the start would cost each session time, and could change results.
    """
    home = directory / "home"
    home.mkdir(exist_ok=True)
    path = os.environ.get("PYTHONPATH")  # where the tests' own moectl is, unless it is installed
    same_code = f" PYTHONPATH={path}" if path else ""
    return f"""SetEnv HOME={home}{same_code}
Port {port}
ListenAddress {address}
HostKey {host_key}
PidFile {directory}/sshd.pid
AuthorizedKeysFile {authorized}
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PrintMotd no
PrintLastLog no
MaxStartups 100:30:200
MaxSessions 100
Subsystem sftp internal-sftp
"""


def known_host(name: str, port: int, host_key: Path) -> str:
    """Return a known_hosts line for a host key."""
    kind, blob = Path(f"{host_key}.pub").read_text().split()[:2]
    return f"{name if port == 22 else f'[{name}]:{port}'} {kind} {blob}\n"


def wait_for_banner(address: str, port: int, timeout_s: float = 15.0) -> None:
    """Wait until a server greets at address:port; raise TimeoutError otherwise."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1.0) as s:
            if s.recv(4) == b"SSH-":
                return
        time.sleep(0.02)
    raise TimeoutError(f"no SSH server at {address}:{port}")


@contextlib.contextmanager
def run_sshd(directory: Path, *lines: str) -> Iterator[Server]:
    """Run sshd on a free port of 127.0.0.1 until the block ends; `lines` come first in its configuration."""
    assert SSHD is not None
    directory.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # privilege separation asks for it
    key, host_key = make_key(directory / "id_test"), make_key(directory / "host_key")
    authorized, known_hosts = directory / "authorized_keys", directory / "known_hosts"
    authorized.write_text(Path(f"{key}.pub").read_text())
    port = find_free_port()
    known_hosts.write_text(known_host("127.0.0.1", port, host_key))
    usual = server_config(directory, "127.0.0.1", port, host_key, authorized)
    (directory / "sshd_config").write_text("\n".join([*lines, usual]))  # the first value of an option counts
    process = subprocess.Popen(
        [SSHD, "-D", "-f", str(directory / "sshd_config"), "-E", str(directory / "sshd.log")],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for_banner("127.0.0.1", port)
        server = Server(
            directory, port, getpass.getuser(), key, host_key, known_hosts, directory / "ssh_config", process
        )
        server.config.touch()
        yield server
    finally:
        process.terminate()
        process.wait()
