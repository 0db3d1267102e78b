"""The Remote contract: one suite for this machine and for a real sshd, then what only SSH has."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import moectl.hosts.ssh.connect
import moectl.hosts.ssh.remote
from moectl.errors import (
    AuthFailed,
    CommandFailed,
    HostError,
    HostKeyError,
    IntegrityError,
    MoectlError,
    Unreachable,
)
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost import files as node
from moectl.hosts.onhost.prelude import parse_answer
from moectl.hosts.remote import LocalRemote, Remote, read_program
from moectl.hosts.ssh.remote import SSHRemote
from tests.support.netns import Cluster
from tests.support.sshd import Server, find_free_port, known_host, make_key

HOSTILE = [
    "two words",
    "new\nline",
    "quote ' double \" back ` tick",
    "$(touch pwned) $HOME ; touch pwned & | >pwned",
    "-rf",
    "--",
    "=ls",
    "~root",
    "*",
    "ü \N{SNOWMAN}",
    "back\\slash \\n",
    "!event",
    "",
]


def refuse_link(path: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))  # as between two file systems


@pytest.fixture(params=["local", "copy", "ssh"])
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    """This machine (hard-linking and copying) and the sshd on it."""
    if request.param == "ssh":
        made: Remote = SSHRemote(request.getfixturevalue("ssh_host"))
    else:
        if request.param == "copy":
            request.getfixturevalue("monkeypatch").setattr(Path, "hardlink_to", refuse_link)
        made = LocalRemote()
    yield made
    made.close()


@pytest.fixture
def ssh(ssh_host: Host) -> Iterator[SSHRemote]:
    made = SSHRemote(ssh_host)
    yield made
    made.close()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write_random(path: Path, size: int) -> str:
    data = os.urandom(size)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


# Commands.


def test_run_gives_code_and_both_outputs(remote: Remote) -> None:
    done = remote.run(["sh", "-c", "cat; echo bad >&2; exit 3"], stdin=b"in\0put", check=False)
    assert (done.code, done.stdout, done.stderr) == (3, b"in\0put", b"bad\n")


def test_run_raises_with_the_commands_last_words(remote: Remote) -> None:
    with pytest.raises(CommandFailed, match=r"exit code 3: it broke$") as caught:
        remote.run(["sh", "-c", "echo first >&2; echo it broke >&2; exit 3"])
    assert caught.value.host == remote.name


def test_run_says_when_there_is_no_such_command(remote: Remote) -> None:
    with pytest.raises(CommandFailed, match="not found"):
        remote.run(["moectl-no-such-command"])


def test_run_interprets_nothing(remote: Remote, tmp_path: Path) -> None:
    script = "import sys; sys.stdout.write('\\0'.join(sys.argv[1:]))"
    done = remote.run([sys.executable, "-c", script, *HOSTILE])
    assert done.stdout.decode().split("\0") == HOSTILE
    assert not (tmp_path / "pwned").exists()


def test_run_refuses_a_nul(remote: Remote) -> None:
    with pytest.raises(CommandFailed, match="NUL"):
        remote.run(["echo", "a\0b"])


def test_run_moves_much_in_all_directions_at_once(remote: Remote) -> None:
    data = os.urandom(3 << 20)
    script = "import sys; d=sys.stdin.buffer.read(); sys.stderr.buffer.write(d); sys.stdout.buffer.write(d)"
    done = remote.run([sys.executable, "-c", script], stdin=data)
    assert done.stdout == data
    assert done.stderr == data


def test_run_ends_what_takes_too_long(remote: Remote) -> None:
    with pytest.raises(CommandFailed, match=r"did not finish within 0.3 s"):
        remote.run(["sleep", "60"], timeout_s=0.3)
    assert remote.run(["echo", "still here"]).stdout == b"still here\n"


def test_a_connection_that_goes_as_the_time_is_up(ssh: SSHRemote, monkeypatch: pytest.MonkeyPatch) -> None:
    close = paramiko.Channel.close

    def fail(channel: paramiko.Channel) -> None:
        close(channel)
        raise EOFError  # what paramiko lets out when the socket broke first

    with monkeypatch.context() as patched:
        patched.setattr(paramiko.Channel, "close", fail)
        with pytest.raises(CommandFailed, match="did not finish"):
            ssh.run(["sleep", "60"], timeout_s=0.3)
    assert ssh.run(["echo", "still here"]).stdout == b"still here\n"


def test_a_leash_ends_an_install_with_its_children(remote: Remote, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"echo $$ > {pid}.new; mv {pid}.new {pid}; sleep 600"
    stamp = tmp_path / "stamp"
    stamp.write_text("of an earlier install")
    request = {"lock": str(tmp_path / "lock"), "stamp": [str(stamp), "x"], "steps": [["sh", "-c", script]]}
    with pytest.raises(CommandFailed, match="did not finish"):
        remote.run(
            [sys.executable, "-c", read_program("deploy"), "install"],
            stdin=json.dumps(request).encode() + b"\n",
            timeout_s=2,
            hold_stdin=True,
        )
    wait_until_gone(int(pid.read_text()))
    assert not stamp.exists()  # nobody takes what is half installed for whole


def test_two_installs_do_not_mix(remote: Remote, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", read_program("deploy"), "install"]
    stamp = tmp_path / "stamp"
    request = {"lock": str(tmp_path / "lock"), "stamp": [str(stamp), "done"], "steps": [["true"]]}
    stdin = json.dumps(request).encode() + b"\n"
    with (tmp_path / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert b'{"error": "busy"}' in remote.run(argv, stdin=stdin, hold_stdin=True).stdout
        assert not stamp.exists()
    assert b"{}" in remote.run(argv, stdin=stdin, hold_stdin=True).stdout
    assert stamp.read_text() == "done"
    failing = {**request, "steps": [["true"], ["sh", "-c", "echo no >&2; exit 3"]]}
    said = remote.run(argv, stdin=json.dumps(failing).encode() + b"\n", hold_stdin=True).stdout
    assert parse_answer(said.strip()) == {"error": "step", "step": 1, "code": 3, "said": "no"}
    assert not stamp.exists()


def test_a_tilde_is_the_home_directory_of_the_login(remote: Remote) -> None:
    with pytest.raises(CommandFailed) as caught:
        remote.run(["~/moectl no such program"])
    assert "moectl no such program" in str(caught.value)


# Processes.


def test_a_process_talks_both_ways_and_ends_when_its_stdin_closes(remote: Remote) -> None:
    script = (
        "import os, sys\n"
        "for l in sys.stdin: print(os.environ['A'], l.strip(), flush=True)\n"
        "print('bye', file=sys.stderr)"
    )
    process = remote.start([sys.executable, "-c", script], env={"A": "it's $HOME\n"})
    for word in (b"one", b"two"):
        process.stdin.write(word + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"it's $HOME\n"
        assert process.stdout.readline() == b" " + word + b"\n"
    with pytest.raises(TimeoutError):
        process.wait(0.05)
    process.stdin.close()
    assert process.wait(20) == 0
    assert process.stdout.read() == b""
    assert process.stderr.read() == b"bye\n"
    process.close()
    process.close()


def test_kill_ends_a_process_on_its_leash_and_its_children(remote: Remote, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    # Like the worker: the end of stdin is the end. The child of the child hangs on the same stdin.
    script = f"echo $$ > {pids}; cat >/dev/null & echo $! >> {pids}; echo up; exec cat"
    process = remote.start(["sh", "-c", script])
    assert process.stdout.readline() == b"up\n"
    process.kill()
    assert process.wait(20) < 0
    assert process.stdout.read() == b""
    for pid in map(int, pids.read_text().split()):
        wait_until_gone(pid)  # each holds the other end of stdin while it ends
    process.stdin.write(b"x")
    with pytest.raises(OSError, match=r"gone|Broken pipe"):
        process.stdin.flush()
    process.close()


def wait_until_gone(pid: int) -> None:
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    pytest.fail(f"process {pid} is still there")


def test_a_process_that_ends_by_itself_gives_its_code(remote: Remote) -> None:
    process = remote.start(["sh", "-c", "exit 7"])
    assert process.wait(20) == 7
    process.kill()
    assert process.wait(1) == 7
    process.close()


def test_a_process_killed_by_a_signal_has_a_negative_code(remote: Remote) -> None:
    process = remote.start(["sh", "-c", "kill -9 $$"])
    assert process.wait(20) < 0
    process.close()


# Files.


def test_put_copies_verifies_and_names_last(remote: Remote, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "er" / "target"
    sha256 = write_random(source, 3_000_001)
    counted: list[int] = []
    remote.put(source, str(target), sha256=sha256, on_bytes=counted.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(counted) == 3_000_001
    assert names_in(target.parent) == ["target"]


@pytest.mark.parametrize("size", [0, 1])
def test_put_copies_tiny_files(remote: Remote, tmp_path: Path, size: int) -> None:
    sha256 = write_random(tmp_path / "source", size)
    remote.put(tmp_path / "source", str(tmp_path / "out" / "target"), sha256=sha256)
    assert (tmp_path / "out" / "target").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("name", [n for n in HOSTILE if n and "/" not in n])
def test_put_takes_hostile_names(remote: Remote, tmp_path: Path, name: str) -> None:
    sha256 = write_random(tmp_path / "source", 10)
    remote.put(tmp_path / "source", f"{tmp_path}/out/{name}", sha256=sha256)
    assert names_in(tmp_path / "out") == [name]


def test_put_replaces_what_has_the_name(remote: Remote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    target = tmp_path / "target"
    target.write_bytes(b"old")
    remote.put(tmp_path / "source", str(target), sha256=sha256)
    assert target.read_bytes() == (tmp_path / "source").read_bytes()


def test_put_refuses_bytes_that_are_not_those_promised(remote: Remote, tmp_path: Path) -> None:
    write_random(tmp_path / "source", 100_000)
    with pytest.raises(IntegrityError, match="source is not what its manifest promises"):
        remote.put(tmp_path / "source", str(tmp_path / "out" / "target"), sha256="0" * 64)
    assert names_in(tmp_path / "out") == []


def test_put_starts_over_when_the_kept_bytes_are_wrong(remote: Remote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 2_000_000)
    (tmp_path / "target.partial").write_bytes(bytes(700_000))
    counted: list[int] = []
    remote.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256, on_bytes=counted.append)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert sum(counted) == 2_000_000


def test_put_starts_over_when_the_partial_file_is_too_long(remote: Remote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    (tmp_path / "target.partial").write_bytes(bytes(5000))
    remote.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_put_says_what_is_in_the_way(remote: Remote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CommandFailed, match=r"cannot write .*/file: ") as caught:
        remote.put(tmp_path / "source", str(tmp_path / "file" / "target"), sha256=sha256)
    assert caught.value.host == remote.name
    with pytest.raises(IntegrityError, match="cannot be read"):
        remote.put(tmp_path / "none", str(tmp_path / "target"), sha256=sha256)
    # And goes on working.
    remote.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.getuid() != 0:
        pytest.skip("mounting a small file system needs root")
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_put_says_how_much_room_is_missing(remote: Remote, tmp_path: Path, small_disk: Path) -> None:
    sha256 = write_random(tmp_path / "source", 5_000_000)
    with pytest.raises(CommandFailed, match=r"disk full: 2\.1 MB free, 5\.0 MB needed") as caught:
        remote.put(tmp_path / "source", str(small_disk / "target"), sha256=sha256)
    assert caught.value.hint == f"free space on {remote.name}, then run it again"
    assert not (small_disk / "target").exists()


def test_a_disk_that_fills_up_on_the_way_is_told_too(ssh: SSHRemote, tmp_path: Path, small_disk: Path) -> None:
    sha256 = write_random(tmp_path / "source", 2_000_000)
    filled = False

    def fill(count: int) -> None:
        nonlocal filled
        if count and not filled:  # the first block is on its way; now another program takes the rest
            filled = True
            (small_disk / "other").write_bytes(bytes(700_000))

    with pytest.raises(CommandFailed, match="disk full"):
        ssh.put(tmp_path / "source", str(small_disk / "target"), sha256=sha256, on_bytes=fill)
    assert not (small_disk / "target").exists()


def test_put_needs_permission(sshd: Server, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    where = "/proc/moectl/target"  # nobody can make a directory there, root included
    for remote in (LocalRemote(), SSHRemote(Host(sshd.add_alias("node0"), python=sys.executable))):
        with pytest.raises(CommandFailed, match="cannot write"):
            remote.put(tmp_path / "source", where, sha256=sha256)
        remote.close()


def test_a_local_put_onto_itself_only_verifies(tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    LocalRemote().put(tmp_path / "source", str(tmp_path / "source"), sha256=sha256)
    LocalRemote().put(tmp_path / "source", str(tmp_path / "linked"), sha256=sha256)
    assert (tmp_path / "linked").samefile(tmp_path / "source")
    with pytest.raises(IntegrityError):
        LocalRemote().put(tmp_path / "source", str(tmp_path / "source"), sha256="0" * 64)
    assert (tmp_path / "source").exists()


def test_a_push_that_died_is_resumed_in_the_middle(ssh: SSHRemote, ssh_host: Host, tmp_path: Path) -> None:
    size = 48 << 20
    sha256 = write_random(tmp_path / "source", size)
    target = tmp_path / "target"

    class Stop(Exception):
        pass

    sent = 0

    def stop(count: int) -> None:
        nonlocal sent
        sent += count
        if sent > size // 2:
            raise Stop

    with pytest.raises(Stop):
        ssh.put(tmp_path / "source", str(target), sha256=sha256, on_bytes=stop)
    ssh.close()
    wait_for_lock(Path(f"{target}.partial"))
    kept = Path(f"{target}.partial").stat().st_size
    assert 0 < kept < size
    assert not target.exists()
    counted: list[int] = []
    again = SSHRemote(ssh_host)
    again.put(tmp_path / "source", str(target), sha256=sha256, on_bytes=counted.append)
    again.close()
    assert counted[0] == kept  # reported as kept, not sent again
    assert sum(counted) == size
    assert node.hash_file(str(target)) == sha256


def wait_for_lock(path: Path) -> None:
    """Wait until the receiver on the host has noticed that its sender is gone."""
    with path.open("rb") as f:
        for _ in range(500):
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                return
    pytest.fail("the receiver did not end")


@pytest.mark.parametrize("remote", ["copy", "ssh"], indirect=True)  # a hard link is made in one step
def test_two_pushes_of_one_file_do_not_mix(remote: Remote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    with (tmp_path / "target.partial").open("wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(CommandFailed, match="another push is writing"):
            remote.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)
    remote.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), kept=st.integers(0, 300), block=st.integers(1, 64), wrong=st.booleans())
def test_receiving_ends_right_or_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, kept: int, block: int, wrong: bool
) -> None:
    target = tmp_path_factory.mktemp("receive") / "target"
    there = data[:kept] if not wrong else bytes(b ^ 1 for b in data[:kept])
    Path(f"{target}.partial").write_bytes(there)
    rest = [0]

    def read(limit: int) -> bytes:
        piece = data[rest[0] : rest[0] + min(limit, block)]
        rest[0] += len(piece)
        return piece

    sha256 = hashlib.sha256(data).hexdigest()

    def receive() -> None:
        node.receive(read, str(target), len(data), sha256, lambda n: rest.__setitem__(0, n))

    if wrong and there:
        with pytest.raises(node.Mismatch) as caught:
            receive()
        assert caught.value.args[1] == len(there)
        assert names_in(target.parent) == []
    else:
        receive()
        assert target.read_bytes() == data
        assert names_in(target.parent) == ["target"]


# What only SSH has: configuration, keys, trust, lost connections.


def fails(kind: type[MoectlError], host: Host) -> MoectlError:
    """Connect, which has to fail with exactly this error."""
    remote = SSHRemote(host)
    with pytest.raises(MoectlError) as caught:
        remote.run(["true"])
    remote.close()
    assert type(caught.value) is kind, caught.value
    assert caught.value.host == host.name
    assert caught.value.exit_code == 5
    return caught.value


def test_an_unknown_host_key_is_refused_with_the_command_to_accept_it(sshd: Server, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    host = Host(sshd.add_alias("node0", f"UserKnownHostsFile {empty}"))
    error = fails(HostKeyError, host)
    assert "its host key is not known here (SHA256:" in error.message
    assert error.hint == f"run 'ssh -F {sshd.config} node0' once, compare the fingerprint and accept the key."
    assert not empty.exists()


def test_accepting_by_configuration_is_not_followed(sshd: Server, tmp_path: Path) -> None:
    lines = ("StrictHostKeyChecking no", f"UserKnownHostsFile {tmp_path / 'empty'}")
    fails(HostKeyError, Host(sshd.add_alias("node0", *lines)))


def test_a_changed_host_key_is_refused_and_the_hint_mends_it(sshd: Server, tmp_path: Path) -> None:
    other, known = make_key(tmp_path / "other"), tmp_path / "known"
    known.write_text(known_host("127.0.0.1", sshd.port, other))
    error = fails(HostKeyError, Host(sshd.add_alias("node0", f"UserKnownHostsFile {known}")))
    assert str(error) == "node0: host key changed since you last connected."
    assert error.hint is not None
    command = error.hint.split("'")[1] if "'[" not in error.hint else error.hint.split("run '")[1].split("', then")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    fails(HostKeyError, Host("node0"))  # now unknown
    known.write_text(sshd.known_hosts.read_text())
    remote = SSHRemote(Host("node0"))
    remote.run(["true"])
    remote.close()


def test_a_revoked_host_key_is_refused(sshd: Server, tmp_path: Path) -> None:
    known = tmp_path / "known"
    line = known_host("127.0.0.1", sshd.port, sshd.host_key)
    known.write_text(line + "@revoked " + line)
    assert "revoked" in fails(HostKeyError, Host(sshd.add_alias("node0", f"UserKnownHostsFile {known}"))).message


def test_hashed_names_aliases_and_plain_names_are_found(sshd: Server, tmp_path: Path) -> None:
    line = known_host("127.0.0.1", sshd.port, sshd.host_key)
    for number, (text, extra) in enumerate(
        [
            (line, "HashKnownHosts yes"),
            (known_host("some-alias", 22, sshd.host_key), "HostKeyAlias some-alias"),
            (known_host("127.0.0.1", 22, sshd.host_key), "Compression no"),
        ]
    ):
        known = tmp_path / f"known{number}"
        known.write_text(text)
        if extra.startswith("Hash"):
            subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
            assert "127.0.0.1" not in known.read_text()
        remote = SSHRemote(Host(sshd.add_alias(f"n{number}", f"UserKnownHostsFile {known}", extra)))
        remote.run(["true"])
        remote.close()


def test_a_wrong_key_is_an_authentication_error(sshd: Server, tmp_path: Path) -> None:
    wrong = make_key(tmp_path / "id_wrong")
    # The first IdentityFile adds to the others, so leave the usual lines out.
    alias = sshd.add_alias("node0", *usual_lines(sshd, wrong), base=False)
    error = fails(AuthFailed, Host(alias))
    assert error.message == f"cannot log in as {sshd.user}: no key was accepted (tried id_wrong)."
    assert error.hint == f"ssh-copy-id -i {wrong} {sshd.user}@node0"


def usual_lines(sshd: Server, key: Path, *extra: str) -> tuple[str, ...]:
    return (
        "HostName 127.0.0.1",
        f"Port {sshd.port}",
        f"User {sshd.user}",
        f"IdentityFile {key}",
        "IdentitiesOnly yes",
        f"UserKnownHostsFile {sshd.known_hosts}",
        *(extra or ("IdentityAgent none",)),
    )


def test_no_key_at_all_says_how_to_make_one(sshd: Server, tmp_path: Path) -> None:
    alias = sshd.add_alias("node0", *usual_lines(sshd, tmp_path / "missing"), base=False)
    error = fails(AuthFailed, Host(alias))
    assert "there is no key to offer" in error.message
    assert error.hint is not None
    assert error.hint.startswith("ssh-keygen")


def test_a_locked_key_asks_for_the_agent_and_the_agent_serves(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "id_locked"
    key.write_bytes(sshd.key.read_bytes())
    key.chmod(0o600)
    Path(f"{key}.pub").write_text(Path(f"{sshd.key}.pub").read_text())
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)], check=True)
    agent_socket = Path("/tmp") / f"moectl-agent-{os.getpid()}"  # a socket's path has to be short
    alias = sshd.add_alias("node0", *usual_lines(sshd, key, "IdentityAgent SSH_AUTH_SOCK"), base=False)
    error = fails(AuthFailed, Host(alias))
    assert "id_locked needs a passphrase and is not in an agent" in error.message
    assert error.hint == f"ssh-add {key}"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent_socket)], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if agent_socket.exists():
                break
            time.sleep(0.01)
        environ = {**os.environ, "SSH_AUTH_SOCK": str(agent_socket)}
        subprocess.run(["ssh-add", "-q", str(sshd.key)], env=environ, check=True, capture_output=True)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent_socket))
        remote = SSHRemote(Host(alias))
        assert remote.run(["echo", "in"]).stdout == b"in\n"
        remote.close()
    finally:
        agent.terminate()
        agent.wait()
        agent_socket.unlink(missing_ok=True)


def test_a_closed_port_and_a_silent_one_are_unreachable(sshd: Server) -> None:
    closed = Host(sshd.add_alias("closed", port=find_free_port()))
    error = fails(Unreachable, closed)
    assert "refused the connection" in error.message
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        fails(Unreachable, Host(sshd.add_alias("silent", "ConnectTimeout 1", port=port)))


def test_what_is_no_ssh_server_is_unreachable(sshd: Server) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        fails(Unreachable, Host(sshd.add_alias("web", "ConnectTimeout 3", port=listener.getsockname()[1])))
        thread.join()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"Exceeded MaxStartups\r\n", "it does not greet as an SSH server: Exceeded MaxStartups"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it does not greet as an SSH server: HTTP/1.1 400 Bad Request"),
        (b"", "it closed the connection before it greeted"),
    ],
)
def test_what_is_said_in_place_of_a_greeting_is_told(sshd: Server, said: bytes, reason: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        error = fails(Unreachable, Host(sshd.add_alias("full", port=listener.getsockname()[1])))
        thread.join()
    assert error.message == f"cannot connect: {reason}"


def test_a_name_without_an_address_is_unreachable(sshd: Server) -> None:
    error = fails(Unreachable, Host("no-such-host.invalid"))
    assert str(error).startswith("no-such-host.invalid: the name has no known address: ")


def test_a_broken_configuration_is_quoted(sshd: Server) -> None:
    sshd.config.write_text("Host *\n  NoSuchOption yes\n")
    error = fails(HostError, Host("node0"))
    assert "ssh refuses its configuration" in error.message


def test_user_and_port_of_the_hosts_file_win(sshd: Server) -> None:
    sshd.add_alias("node0", port=find_free_port())
    remote = SSHRemote(Host("node0", user=sshd.user, port=sshd.port))
    assert remote.run(["echo", "in"]).stdout == b"in\n"
    remote.close()


def test_includes_and_match_blocks_count(sshd: Server, tmp_path: Path) -> None:
    included = replace(sshd, config=tmp_path / "more")
    included.add_alias("node7")
    sshd.config.write_text(f"Include {included.config}\nMatch host 127.0.0.1 exec true\n  ConnectTimeout 7\n")
    remote = SSHRemote(Host("node7"))
    remote.run(["true"])
    remote.close()


def test_proxy_jump_goes_through_several_hosts(sshd: Server) -> None:
    sshd.add_alias("jump1")
    sshd.add_alias("jump2")
    sshd.add_alias("one", "ProxyJump jump1")
    sshd.add_alias("two", "ProxyJump jump1,jump2")
    for name, length in (("one", 2), ("two", 3)):
        remote = SSHRemote(Host(name))
        assert remote.run(["echo", "in"]).stdout == b"in\n"
        assert len(remote._opened._exit_callbacks) >= 2 * length  # type: ignore[attr-defined]
        remote.close()


def test_a_failing_jump_host_is_named(sshd: Server) -> None:
    sshd.add_alias("bastion", port=find_free_port())
    sshd.add_alias("node0", "ProxyJump bastion")
    remote = SSHRemote(Host("node0"))
    with pytest.raises(Unreachable, match=r"bastion: port \d+ refused the connection \(jump host to node0\)"):
        remote.run(["true"])


def test_jumps_in_a_circle_end(sshd: Server) -> None:
    sshd.add_alias("a", "ProxyJump b")
    sshd.add_alias("b", "ProxyJump a")
    remote = SSHRemote(Host("a"))
    with pytest.raises(HostError, match="goes round in a circle"):
        remote.run(["true"])


def test_proxy_command_is_run_and_ended(sshd: Server, tmp_path: Path) -> None:
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "def up():\n"
        "    while d := os.read(0, 65536): s.sendall(d)\n"
        "    os._exit(0)\n"
        "threading.Thread(target=up, daemon=True).start()\n"
        "while d := s.recv(65536): os.write(1, d)\n"
    )
    remote = SSHRemote(Host(sshd.add_alias("node0", f"ProxyCommand {sys.executable} {relay} %h %p")))
    assert remote.run(["echo", "in"]).stdout == b"in\n"
    remote.close()
    wait_until_gone(int((tmp_path / "pid").read_text()))
    fails(Unreachable, Host(sshd.add_alias("broken", "ProxyCommand false")))


def test_a_lost_connection_is_told_and_mended(ssh: SSHRemote) -> None:
    process = ssh.start(["cat"])
    server = int(ssh.run(["sh", "-c", "ps -o ppid= -p $PPID | tr -d ' '; echo $PPID"]).stdout.split()[-1])
    os.kill(server, signal.SIGKILL)  # this connection's own sshd
    assert process.stdout.read() == b""
    with pytest.raises(Unreachable, match="the connection was lost"):
        process.wait(20)
    process.close()
    assert ssh.run(["echo", "again"]).stdout == b"again\n"


@pytest.mark.parametrize("victim", ["receiver", "connection"])
def test_a_file_goes_on_when_its_connection_is_lost(ssh: SSHRemote, tmp_path: Path, victim: str) -> None:
    size = 8 << 20
    sha256 = write_random(tmp_path / "source", size)
    telling = tmp_path / "telling-python"
    telling.write_text(f'#!/bin/sh\necho $$ $PPID >> {tmp_path}/pids\nexec {sys.executable} "$@"\n')
    telling.chmod(0o755)
    ssh.python = str(telling)
    told: list[int] = []

    def break_off(count: int) -> None:
        if sum(told) < size // 2 <= sum(told) + count and min(told) >= 0:
            pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
            os.kill(pids[0 if victim == "receiver" else 1], signal.SIGKILL)
        told.append(count)

    ssh.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256, on_bytes=break_off)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert sum(told) == size
    assert min(told) < 0  # the first try was taken back


def test_a_file_whose_every_connection_is_lost_is_given_up(ssh: SSHRemote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    dying = tmp_path / "dying-python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    ssh.python = str(dying)
    with pytest.raises(Unreachable, match="the connection was lost while a file was sent: its python was killed"):
        ssh.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)


def test_noise_of_the_login_shell_is_no_answer(ssh: SSHRemote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    noisy = tmp_path / "noisy-python"
    noisy.write_text(f'#!/bin/sh\necho "Welcome to this Mac!"\necho not json\nexec {sys.executable} "$@"\n')
    noisy.chmod(0o755)
    ssh.python = str(noisy)
    ssh.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)
    assert (tmp_path / "target").stat().st_size == 1000


def test_noise_without_a_line_end_is_no_answer_either(ssh: SSHRemote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    noisy = tmp_path / "noisy-python"
    noisy.write_text(f'#!/bin/sh\nprintf "\\033]0;title\\007$ "\nexec {sys.executable} "$@"\n')
    noisy.chmod(0o755)
    ssh.python = str(noisy)
    ended = threading.Thread(
        target=ssh.put, args=(tmp_path / "source", str(tmp_path / "target")), kwargs={"sha256": sha256}, daemon=True
    )
    ended.start()
    ended.join(20)
    assert not ended.is_alive()
    assert (tmp_path / "target").stat().st_size == 1000


def test_a_source_that_breaks_on_the_way_is_not_blamed_on_the_host(ssh: SSHRemote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 4 << 20)
    target = str(tmp_path / "target")

    def break_off(count: int) -> None:
        if count:
            raise OSError(errno.EIO, "the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        ssh.put(tmp_path / "source", target, sha256=sha256, on_bytes=break_off)
    Path(f"{target}.partial").unlink(missing_ok=True)
    # Reading /proc/self/mem at its start fails with EIO, as a damaged disk would.
    with pytest.raises(IntegrityError, match=r"/proc/self/mem cannot be read: Input/output error"):
        moectl.hosts.ssh.remote._stream_file(Path("/proc/self/mem"), 0, 100, ssh._execute(["cat"]), lambda n: None)


def test_a_host_without_python_says_so(ssh: SSHRemote, tmp_path: Path) -> None:
    sha256 = write_random(tmp_path / "source", 1000)
    ssh.python = "moectl-no-such-python"
    with pytest.raises(CommandFailed, match=r"cannot receive files: .*not found"):
        ssh.put(tmp_path / "source", str(tmp_path / "target"), sha256=sha256)


def test_the_fast_cipher_is_agreed(ssh: SSHRemote) -> None:
    ssh.run(["true"])
    assert getattr(ssh._transport, "remote_cipher", None) == "aes128-gcm@openssh.com"


@pytest.mark.netns
def test_a_host_that_falls_silent_is_noticed(netns: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moectl.hosts.ssh.connect, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(moectl.hosts.ssh.connect, "DEAD_AFTER_S", 2)
    remote = SSHRemote(netns.hosts()[0])
    process = remote.start(["cat"])
    netns.cut(0)
    assert process.stdout.read() == b""  # nothing is heard any more
    with pytest.raises(Unreachable):
        process.wait(20)
    process.close()
    with pytest.raises(Unreachable, match="no answer"):
        remote.run(["true"])
    netns.heal(0)
    assert remote.run(["hostname"]).stdout == b"node0\n"
    remote.close()


@pytest.mark.netns
def test_a_host_that_falls_silent_behind_a_jump_host_is_noticed(
    netns: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moectl.hosts.ssh.connect, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(moectl.hosts.ssh.connect, "DEAD_AFTER_S", 2)
    config = tmp_path / "config"
    config.write_text("Host node1\n  ProxyJump node0\n" + netns.config.read_text())
    monkeypatch.setenv("MOECTL_SSH_CONFIG", str(config))
    remote = SSHRemote(netns.hosts()[1])
    process = remote.start(["cat"])
    netns.cut(1)
    ended = threading.Thread(target=process.stdout.read, daemon=True)
    ended.start()
    ended.join(60)
    assert not ended.is_alive()
    with pytest.raises(Unreachable):
        process.wait(1)
    process.close()
    remote.close()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    for name in (f"note.{gone.pid}.tmp", f"note.{os.getppid()}.tmp", "note.mine.tmp", f"other.{gone.pid}.tmp"):
        (tmp_path / name).touch()
    node.write(str(tmp_path / "note"), b"text")
    left = {"note", f"note.{os.getppid()}.tmp", "note.mine.tmp", f"other.{gone.pid}.tmp"}
    assert {p.name for p in tmp_path.iterdir()} == left
