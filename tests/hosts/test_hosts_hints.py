"""What the hints about hosts and ssh say is done, and then it succeeds."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moectl.errors import CommandFailed, HostsError, IntegrityError, Unreachable
from moectl.hosts.hostfile import Host, HostList, format_hosts, parse_hosts
from moectl.hosts.mlx_hostfile import to_mlx_json
from moectl.hosts.onhost.files import hash_file
from moectl.hosts.remote import LocalRemote
from tests.hosts.test_ssh_identity import accept, add, make, refused
from tests.support.beside import ask_moectl, both_get_in, run_agent, usual
from tests.support.sshd import Server, make_key, run_sshd


@pytest.fixture
def server(sshd: Server, tmp_path: Path) -> Iterator[Server]:
    """The sshd, whose list of keys is put back afterwards."""
    authorized = sshd.directory / "authorized_keys"
    before = authorized.read_text()
    yield sshd
    authorized.write_text(before)


def test_a_name_is_written_with_the_address_that_the_hint_asks_for() -> None:
    hosts = HostList((Host("no-such-host.invalid"), Host("b", ips=("10.0.0.2",))))
    with pytest.raises(HostsError) as caught:
        to_mlx_json(hosts)
    assert caught.value.hint == "write 'no-such-host.invalid ip=…'"
    mended = parse_hosts(f"{caught.value.hint.split(chr(39))[1].replace('…', '10.0.0.1')}\nb ip=10.0.0.2\n")
    assert '"10.0.0.1"' in to_mlx_json(mended)


def test_variables_are_written_as_the_hint_says() -> None:
    hosts = HostList((Host("a", ips=("10.0.0.1",)),), envs=("A=b",))
    with pytest.raises(HostsError) as caught:
        format_hosts(hosts)
    assert caught.value.hint == "write MLX's JSON: a name that ends in .json"
    assert parse_hosts(to_mlx_json(hosts)).envs == ("A=b",)


def test_a_key_of_the_kind_that_the_hint_makes_is_accepted(server: Server, tmp_path: Path) -> None:
    key = make(tmp_path / "short", "-t", "rsa", "-b", "2048")
    accept(server, key)
    error = refused(server, add(server, key, "RequiredRSASize 3072"))
    assert error.hint == "ssh-keygen -t ed25519"
    made = tmp_path / "made"
    subprocess.run([*str(error.hint).split(), "-q", "-N", "", "-f", str(made)], check=True)
    accept(server, made)
    server.config.write_text("")
    both_get_in(server, add(server, made, "RequiredRSASize 3072"))


def test_an_agent_that_signs_as_the_hint_demands_gets_in(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make_key(tmp_path / "held")
    accept(server, held)
    monkeypatch.setenv("SSH_ASKPASS", "/bin/false")  # the person who is asked says no
    with run_agent() as agent:
        environ = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
        subprocess.run(["ssh-add", "-q", "-c", str(held)], env=environ, check=True, capture_output=True)
        error = refused(server, add(server, f"{held}.pub", f"IdentityAgent {agent}"))
        assert error.hint == "ssh-add -T KEY.pub has to sign: is the agent locked, or did it ask for permission?"
        test = ["ssh-add", "-T", f"{held}.pub"]
        assert subprocess.run(test, env=environ, capture_output=True, check=False).returncode != 0
        subprocess.run(["ssh-add", "-q", str(held)], env=environ, check=True, capture_output=True)
        subprocess.run(test, env=environ, check=True, capture_output=True)
        both_get_in(server, "node0")


def test_after_too_many_keys_the_lines_of_the_hint_get_in(tmp_path: Path) -> None:
    others = [make_key(tmp_path / f"other{i}") for i in range(3)]
    with run_sshd(tmp_path / "sshd", "MaxAuthTries 2") as server, run_agent(*others) as agent:
        lines = usual(server, server.key, f"IdentityAgent {agent}", "IdentitiesOnly no")
        alias = server.add_alias("node0", *(x for x in lines if not x.startswith("IdentityFile")), base=False)
        error = refused(server, alias)
        assert error.hint == "under 'Host node0' in ~/.ssh/config set IdentityFile and 'IdentitiesOnly yes'"
        server.config.write_text("")
        both_get_in(server, add(server, server.key, f"IdentityAgent {agent}"))


def test_the_command_of_the_hint_works_and_then_moectl_connects(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        alias = server.add_alias("node0", "ConnectTimeout 5", port=port)
        error: list[Exception | None] = []

        def ask() -> None:
            error.append(ask_moectl(server.config, alias))

        asking = threading.Thread(target=ask)
        asking.start()
        connection, _ = listener.accept()
        connection.close()  # as an sshd that just starts or stops
        asking.join()
    [refusal] = error
    assert isinstance(refusal, Unreachable)
    assert (refusal.hint or "").startswith("try: ssh ")
    server.config.write_text("")
    server.add_alias("node0")
    words = str(refusal.hint).removeprefix("try: ").split()
    command = [words[0], "-F", str(server.config), *words[1:]]
    command = [w for i, w in enumerate(command) if w != "-p" and command[i - 1] != "-p"]
    subprocess.run([*command, "true"], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    assert ask_moectl(server.config, "node0") is None


def test_after_the_login_works_without_a_question_as_the_hint_demands_moectl_gets_in(tmp_path: Path) -> None:
    with run_sshd(tmp_path / "sshd", "AuthenticationMethods publickey,publickey") as server:
        second = make_key(tmp_path / "second")
        accept(server, second)
        error = refused(server, add(server, server.key))
        assert (error.hint or "").startswith("this has to work without a question: ssh ")
        server.config.write_text("")
        both_get_in(server, add(server, server.key, f"IdentityFile {second}"))


@pytest.mark.skipif(not pwd.getpwuid(os.getuid()).pw_shell.endswith("bash"), reason="the login shell is no bash")
def test_a_shell_that_runs_true_at_once_as_the_hint_demands_runs_commands(tmp_path: Path) -> None:
    with run_sshd(tmp_path / "one", "ForceCommand echo 'not available'; exit 1") as server:
        error = ask_moectl(server.config, server.add_alias("node0"))
    assert isinstance(error, CommandFailed)
    assert (error.hint or "").startswith("over ssh, 'true' has to end at once and print nothing: ")
    assert "sshd's ForceCommand" in (error.hint or "")
    with run_sshd(tmp_path / "two") as server:
        both_get_in(server, server.add_alias("node0"))


def test_a_file_that_was_cut_again_is_sent_as_the_hint_says(tmp_path: Path) -> None:
    source, place = tmp_path / "source", str(tmp_path / "place")
    source.write_bytes(b"whole")
    promised = hash_file(str(source))
    source.write_bytes(b"wrong")
    remote = LocalRemote()
    for text in (b"wrong", None):
        source.unlink()
        if text:
            source.write_bytes(text)
        with pytest.raises(IntegrityError) as caught:
            remote.put(source, place, sha256=promised)
        assert caught.value.hint == "moectl shard --verify"
    source.write_bytes(b"whole")
    remote.put(source, place, sha256=promised)
    assert Path(place).read_bytes() == b"whole"
