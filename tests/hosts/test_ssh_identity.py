"""Who we are to a host: every form of IdentityFile, certificates and agents, the real ssh beside moectl."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.errors import AuthFailed, MoectlError
from moectl.hosts.ssh.identity import add_key
from tests.support.beside import ask_moectl, both_get_in, both_refuse, run_agent, sign, usual
from tests.support.sshd import Server, make_key, run_sshd


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("ca") / "user_ca")


@pytest.fixture(scope="module")
def module_server(tmp_path_factory: pytest.TempPathFactory, authority: Path) -> Iterator[Server]:
    with run_sshd(tmp_path_factory.mktemp("sshd"), f"TrustedUserCAKeys {authority}.pub", "MaxAuthTries 20") as server:
        yield server


@pytest.fixture
def server(module_server: Server, tmp_path: Path) -> Server:
    found = replace(module_server, config=tmp_path / "ssh_config")
    found.config.touch()
    return found


def add(server: Server, key: Path | str, *lines: str) -> str:
    """Add an alias whose only IdentityFile is this one."""
    return server.add_alias("node0", *usual(server, key, *lines), base=False)


def make(path: Path, *options: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-N", "", *options, "-f", str(path)], check=True)
    return path


def accept(server: Server, key: Path) -> None:
    with (server.directory / "authorized_keys").open("a") as f:
        f.write(Path(f"{key}.pub").read_text())


def refused(server: Server, alias: str) -> MoectlError:
    error = both_refuse(server, alias)
    assert isinstance(error, AuthFailed)
    return error


@pytest.mark.parametrize(
    "options",
    [
        ["-t", "rsa", "-b", "2048"],
        ["-t", "rsa", "-b", "2048", "-m", "PEM"],
        ["-t", "rsa", "-b", "2048", "-m", "PKCS8"],
        ["-t", "ecdsa", "-b", "256"],
        ["-t", "ecdsa", "-b", "384", "-m", "PEM"],
        ["-t", "ecdsa", "-b", "521", "-m", "PKCS8"],
        ["-t", "ed25519"],
    ],
    ids=" ".join,
)
def test_every_format_of_private_keys_is_read(server: Server, tmp_path: Path, options: list[str]) -> None:
    key = make(tmp_path / "my key", *options)
    accept(server, key)
    both_get_in(server, add(server, f'"{key}"'))
    Path(f"{key}.pub").unlink()
    both_get_in(server, "node0")


def test_a_pkcs8_key_of_ed25519_is_read(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(key)], check=True)
    key.chmod(0o600)
    add(server, key)
    error = ask_moectl(server.config, "node0")  # ssh reads it since 9.6
    assert error is not None
    assert "(tried key.pem)" in error.message


@pytest.mark.parametrize("form", ["PEM", "PKCS8", "RFC4716"])
def test_a_locked_key_of_every_format_asks_for_the_agent(server: Server, tmp_path: Path, form: str) -> None:
    key = make(tmp_path / "locked", "-t", "rsa", "-b", "2048", *(["-m", form] if form != "RFC4716" else []))
    accept(server, key)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-m", form, "-f", str(key)], check=True)
    error = refused(server, add(server, key))
    assert "locked needs a passphrase and is not in an agent" in error.message
    assert error.hint == f"ssh-add {key}"
    asked = tmp_path / "ask"
    asked.write_text("#!/bin/sh\necho secret\n")
    asked.chmod(0o755)
    with run_agent() as agent:
        # The hint, followed: with a program in the place of a person who types.
        environ = {**os.environ, "SSH_AUTH_SOCK": str(agent), "SSH_ASKPASS": str(asked), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(error.hint, shell=True, env=environ, check=True, capture_output=True)
        server.config.write_text("")
        both_get_in(server, add(server, key, f"IdentityAgent {agent}"))


def test_on_a_mac_the_keychain_may_know_the_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    assert add_key(Path("/keys/my key")) == "ssh-add '/keys/my key'" or sys.platform == "darwin"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert add_key(Path("/keys/my key")) == "ssh-add --apple-use-keychain '/keys/my key'"


@pytest.mark.parametrize("name", ["mac.pub", "mac"])
def test_a_public_key_selects_the_agents_key(server: Server, tmp_path: Path, name: str) -> None:
    public = tmp_path / name
    shutil.copy(f"{server.key}.pub", public)
    other = make_key(tmp_path / "other")
    with run_agent(other, server.key) as agent:
        both_get_in(server, add(server, public, f"IdentityAgent {agent}"))


def test_a_public_key_without_its_private_one_is_named_and_the_hint_mends_it(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "mac"
    shutil.copy(server.key, key)
    shutil.copy(f"{server.key}.pub", f"{key}.pub")
    with run_agent() as agent:
        error = refused(server, add(server, f"{key}.pub", f"IdentityAgent {agent}"))
        assert "mac.pub is a public key, whose private key is in no agent" in error.message
        assert error.hint == f"ssh-add {key}"
        environ = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
        subprocess.run(error.hint, shell=True, env=environ, check=True, capture_output=True)
        both_get_in(server, "node0")


@pytest.mark.parametrize("token", ["%L_id", "%l_id", "%C", "%k-%n-%h-%p-%r-%u-%i", "%%", "${{MOE_KEYS}}/id"])
def test_tokens_and_variables_in_an_identity_file(
    server: Server, tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token.replace("{{", "{").replace("}}", "}")
    monkeypatch.setenv("MOE_KEYS", "%h")  # a variable's value is not filled in again
    server.add_alias("node0", *usual(server, "none", f"ControlPath {tmp_path}/{token}"), base=False)
    asked = subprocess.run(["ssh", "-G", "-F", str(server.config), "node0"], capture_output=True, text=True, check=True)
    server.config.write_text("")
    path = Path(next(line for line in asked.stdout.splitlines() if line.startswith("controlpath")).split(" ", 1)[1])
    path.parent.mkdir(exist_ok=True)
    shutil.copy(server.key, path)
    both_get_in(server, add(server, f"{tmp_path}/{token}"))


def test_a_key_that_others_may_read_is_not_used_and_the_hint_mends_it(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "open"
    shutil.copy(server.key, key)
    key.chmod(0o644)
    error = refused(server, add(server, key))
    assert "others may read open" in error.message
    assert error.hint == f"chmod 600 {key}"
    subprocess.run(error.hint, shell=True, check=True)
    both_get_in(server, "node0")


def test_a_key_of_openssl_with_its_curve_spelled_out_is_read(server: Server, tmp_path: Path) -> None:
    key = tmp_path / "explicit"
    with key.open("wb") as f:
        subprocess.run(
            ["openssl", "ecparam", "-name", "prime256v1", "-param_enc", "explicit", "-genkey", "-noout"],
            stdout=f,
            check=True,
        )
    key.chmod(0o600)
    with (server.directory / "authorized_keys").open("a") as f:
        subprocess.run(["ssh-keygen", "-y", "-f", str(key)], stdout=f, check=True)
    both_get_in(server, add(server, key))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PuTTY-User-Key-File-3: ssh-ed25519\n", "is a key of PuTTY"),
        ("no key at all\n", "holds no private key that can be used"),
    ],
)
def test_what_is_no_private_key_is_named(server: Server, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "odd").write_text(text)
    (tmp_path / "odd").chmod(0o600)
    assert f"odd {words}" in refused(server, add(server, tmp_path / "odd")).message


# Certificates.


@pytest.mark.parametrize("kind", [["ed25519"], ["rsa", "-b", "2048"], ["ecdsa"]], ids=lambda kind: kind[0])
@pytest.mark.parametrize("place", ["beside", "elsewhere"])
def test_a_certificate_is_offered_with_its_key(
    server: Server, tmp_path: Path, authority: Path, kind: list[str], place: str
) -> None:
    key = make(tmp_path / "key", "-t", *kind)
    certificate = sign(authority, Path(f"{key}.pub"), "-n", server.user, "-V", "+1w")
    lines = []
    if place == "elsewhere":
        lines = [f'CertificateFile "{certificate.rename(tmp_path / "its certificate.pub")}"']
    both_get_in(server, add(server, key, *lines))
    with run_agent(key) as agent:  # ssh-add takes the certificate beside the key as well
        private = key.rename(tmp_path / "away")
        server.config.write_text("")
        both_get_in(server, add(server, key, *lines, f"IdentityAgent {agent}"))
        private.rename(key)


def test_a_certificate_that_is_not_accepted_leaves_its_key(server: Server, tmp_path: Path) -> None:
    key = make_key(tmp_path / "key")
    sign(make_key(tmp_path / "other_ca"), Path(f"{key}.pub"), "-n", server.user)
    accept(server, key)
    both_get_in(server, add(server, key))


def test_a_certificate_without_its_key_is_named(server: Server, tmp_path: Path, authority: Path) -> None:
    key = make_key(tmp_path / "key")
    certificate = sign(authority, Path(f"{key}.pub"), "-n", server.user).rename(tmp_path / "lone.pub")
    key.unlink()
    Path(f"{key}.pub").unlink()
    error = refused(server, add(server, key, f"CertificateFile {certificate}"))
    assert "lone.pub is a certificate without its key" in error.message
    server.config.write_text("")
    error = refused(server, add(server, key, f"CertificateFile {tmp_path}/nowhere"))
    assert f"CertificateFile {tmp_path}/nowhere is not a certificate for a user" in error.message


# Agents.


def test_every_form_of_identity_agent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_agent(server.key) as agent:
        monkeypatch.setenv("MOE_AGENT", str(agent))
        monkeypatch.setenv("MOE_DIR", str(agent.parent))
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        link = agent.parent / f"moe {socket.gethostname().split('.')[0]}-{os.getpid()}"
        link.symlink_to(agent)
        forms = ["SSH_AUTH_SOCK", "$MOE_AGENT", str(agent), f"${{MOE_DIR}}/{agent.name}", '"/tmp/moe %L-PID"']
        for form in forms:
            server.config.write_text("")
            form = form.replace("PID", str(os.getpid()))
            both_get_in(server, add(server, f"{server.key}.pub", f"IdentityAgent {form}"))
        link.unlink()
        server.config.write_text("")
        refused(server, add(server, f"{server.key}.pub", "IdentityAgent none"))


def test_an_agent_that_does_not_answer_is_named(server: Server, tmp_path: Path) -> None:
    error = refused(server, add(server, tmp_path / "none", f"IdentityAgent {tmp_path}/gone"))
    assert f"no agent answers at {tmp_path}/gone" in error.message


def test_what_the_configuration_forbids_is_named_and_the_hint_mends_it(server: Server, tmp_path: Path) -> None:
    error = refused(server, add(server, server.key, "PubkeyAcceptedAlgorithms rsa-sha2-512"))
    assert "id_test: PubkeyAcceptedAlgorithms leaves out ssh-ed25519" in error.message
    assert error.hint == "add ssh-ed25519 to PubkeyAcceptedAlgorithms"
    server.config.write_text("")
    both_get_in(server, add(server, server.key, "PubkeyAcceptedAlgorithms rsa-sha2-512,ssh-ed25519"))
    key = make(tmp_path / "short", "-t", "rsa", "-b", "2048")
    accept(server, key)
    server.config.write_text("")
    error = refused(server, add(server, key, "RequiredRSASize 3072"))
    assert "short is shorter than RequiredRSASize 3072" in error.message


def test_other_ways_to_log_in_are_named_when_no_key_opens(server: Server, tmp_path: Path) -> None:
    error = refused(server, add(server, make_key(tmp_path / "wrong"), "PKCS11Provider /nowhere.so"))
    assert "PKCS11Provider is set, but moectl uses its keys from an agent only (ssh-add -s)" in error.message
    server.config.write_text("")
    error = refused(server, add(server, tmp_path / "wrong", "GSSAPIAuthentication yes", f"ControlPath {tmp_path}/c"))
    assert "GSSAPI" not in error.message  # the host does not offer it
    assert "ControlPath" not in error.message  # no ssh holds a connection there


def test_an_agent_that_does_not_sign_leaves_the_next_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make(tmp_path / "held", "-t", "ed25519")
    accept(server, held)
    monkeypatch.setenv("SSH_ASKPASS", "/bin/false")  # the person who is asked says no
    with run_agent() as agent:
        environ = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
        subprocess.run(["ssh-add", "-q", "-c", str(held)], env=environ, check=True, capture_output=True)
        lines = (f"IdentityAgent {agent}", "IdentitiesOnly no")
        both_get_in(server, server.add_alias("node0", *usual(server, server.key, *lines), base=False))
        server.config.write_text("")
        error = refused(server, add(server, f"{held}.pub", f"IdentityAgent {agent}"))
        assert "the agent did not sign with" in error.message
        subprocess.run(["ssh-add", "-q", str(held)], env=environ, check=True, capture_output=True)
        both_get_in(server, "node0")


def test_a_host_that_wants_two_keys_gets_two(tmp_path: Path) -> None:
    with run_sshd(tmp_path / "sshd", "AuthenticationMethods publickey,publickey") as server:
        second = make(tmp_path / "second", "-t", "ed25519")
        error = refused(server, add(server, server.key))
        assert "the host asks for a further key beside id_test" in error.message
        accept(server, second)
        server.config.write_text("")
        both_get_in(server, add(server, server.key, f"IdentityFile {second}"))


def type_there(tmp_path: Path, server: Server) -> dict[str, str]:
    """Return an environment in which ssh-copy-id gets in as by a password: with a key that the host knows."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ssh").mkdir()
    by_hand = tmp_path / "by_hand"
    by_hand.write_text("Host *\n  " + "\n  ".join(usual(server, server.key)) + "\n")
    program = tmp_path / "bin" / "ssh"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *=publickey*) echo "Permission denied (publickey)." >&2; exit 255;; esac\n'
        f'exec {shutil.which("ssh")} -F {by_hand} "$@"\n'
    )
    program.chmod(0o755)
    return {**os.environ, "HOME": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("there", ["no key", "a key", "a key without its public one"])
def test_the_hint_of_a_key_that_is_not_accepted_makes_and_copies_the_one_that_is_offered(
    tmp_path: Path, there: str
) -> None:
    home, key = tmp_path / "home", tmp_path / "my keys" / "mac"
    home.mkdir()
    key.parent.mkdir()
    with run_sshd(
        tmp_path / "sshd",
        f"SetEnv HOME={home}",
        f"AuthorizedKeysFile {home}/.ssh/authorized_keys {tmp_path}/sshd/authorized_keys",
    ) as server:
        if there != "no key":
            make(key, "-t", "ed25519")
        if there == "a key without its public one":
            Path(f"{key}.pub").unlink()
        error = refused(server, add(server, f'"{key}"'))
        assert error.hint is not None
        command = error.hint.replace(", then ", " && ").replace("-t ed25519", "-t ed25519 -q -N ''")
        subprocess.run(command, shell=True, env=type_there(tmp_path, server), check=True, capture_output=True)
        both_get_in(server, "node0")


def test_the_hint_where_the_configuration_offers_no_key_mends_it(server: Server) -> None:
    error = refused(server, add(server, "none"))
    assert error.hint == "remove 'IdentityFile none' for this host (~/.ssh/config)"
    server.config.write_text(server.config.read_text().replace("IdentityFile none", f"IdentityFile {server.key}"))
    both_get_in(server, "node0")


def test_what_the_host_says_at_its_door_is_told_when_no_key_opens_it(tmp_path: Path) -> None:
    said = tmp_path / "banner"
    said.write_text("  Accounts of this cluster:\n  ask ada\n")
    with run_sshd(tmp_path / "sshd", "AllowUsers nobody", f"Banner {said}") as server:
        error = refused(server, add(server, server.key))
        assert error.message.endswith("(tried id_test). The host says: Accounts of this cluster: ask ada")


def test_a_name_without_an_address_of_the_family_names_it_and_the_hint_mends_it(server: Server) -> None:
    error = both_refuse(server, add(server, server.key, "AddressFamily inet6"))
    assert (
        error.message
        == "127.0.0.1 has no known address of AddressFamily inet6: Address family for hostname not supported"
    )
    assert error.hint == "remove AddressFamily from ~/.ssh/config for this host, or give it another HostName there"
    server.config.write_text(server.config.read_text().replace("AddressFamily inet6", ""))
    both_get_in(server, "node0")
