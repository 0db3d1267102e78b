"""Whom to trust: known hosts, authorities, revocation, KnownHostsCommand; the real ssh beside moectl."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pexpect
import pytest

from moectl.errors import HostKeyError, MoectlError
from tests.support.beside import ask_moectl, ask_ssh, both_get_in, both_refuse, compare, fingerprint_line, sign
from tests.support.sshd import Server, known_host, make_key, run_sshd


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("ca") / "host_ca")


@pytest.fixture(scope="module")
def certified_module(tmp_path_factory: pytest.TempPathFactory, authority: Path) -> Iterator[Server]:
    """A host with a certificate for 127.0.0.1, and its plain key."""
    directory = tmp_path_factory.mktemp("certified")
    key = make_key(directory / "certified_key")
    certificate = sign(authority, Path(f"{key}.pub"), "-h", "-n", "127.0.0.1,mac1", "-V", "+1w", "-z", "7")
    with run_sshd(directory, f"HostKey {key}", f"HostCertificate {certificate}") as server:
        yield replace(server, host_key=key)


@pytest.fixture
def certified(certified_module: Server, tmp_path: Path) -> Server:
    found = replace(certified_module, config=tmp_path / "ssh_config", known_hosts=tmp_path / "known")
    found.config.touch()
    return found


def trust(server: Server, authority: Path, pattern: str = "") -> str:
    """Return an @cert-authority line."""
    return f"@cert-authority {pattern or f'[127.0.0.1]:{server.port}'} {fingerprint_line(Path(f'{authority}.pub'))}\n"


def refused(server: Server, alias: str = "node0") -> MoectlError:
    error = both_refuse(server, alias)
    assert isinstance(error, HostKeyError)
    return error


def answer_yes(command: str) -> None:
    """Run an ssh command as a person who says yes to the question about the host key."""
    child = pexpect.spawn("/bin/sh", ["-c", f"{command} true"], timeout=60)
    child.expect("continue connecting")
    child.sendline("yes")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


# Certificates.


@pytest.mark.parametrize("pattern", ["", "127.0.0.1", "*", "[127.0.0.*]:*"])
def test_a_certificate_of_a_known_authority_is_trusted(certified: Server, authority: Path, pattern: str) -> None:
    certified.known_hosts.write_text(trust(certified, authority, pattern))
    both_get_in(certified, certified.add_alias("node0"))


def test_a_certificate_counts_for_the_alias_of_the_host_key(certified: Server, authority: Path) -> None:
    certified.known_hosts.write_text(trust(certified, authority, "mac*"))
    both_get_in(certified, certified.add_alias("node0", "HostKeyAlias mac1"))
    assert (
        "it is for 127.0.0.1, mac1, not for mac2"
        in refused(certified, certified.add_alias("node2", "HostKeyAlias mac2")).message
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-h", "-n", "127.0.0.2"], "it is for 127.0.0.2, not for 127.0.0.1"),
        (["-n", "127.0.0.1"], "it is for a user"),
        (["-h", "-n", "127.0.0.1", "-V", "20200101:20200102"], "it has expired"),
        (["-h", "-n", "127.0.0.1", "-V", "20990101:20990102"], "it is not valid yet"),
        (["-h", "-n", "127.0.0.1", "-O", "critical:x=y"], "it has critical options"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_certificate_that_does_not_count_says_why_and_the_hint_mends_it(
    tmp_path: Path, authority: Path, options: list[str], words: str
) -> None:
    key = make_key(tmp_path / "key")
    certificate = sign(authority, Path(f"{key}.pub"), *options)
    with run_sshd(tmp_path / "server", f"HostKey {key}", f"HostCertificate {certificate}") as made:
        server = replace(made, known_hosts=tmp_path / "known")
        server.known_hosts.write_text(trust(server, authority))
        error = ask_moectl(server.config, server.add_alias("node0"))
        assert isinstance(error, HostKeyError)
        if "for a user" not in words:  # sshd does not show such a one
            assert f"its certificate does not count: {words}" in error.message
        assert ask_ssh(server.config, "node0").returncode != 0
        assert error.hint is not None
        answer_yes(error.hint.split("'")[1])
        both_get_in(server, "node0")


def test_a_certificate_of_another_authority_does_not_count(certified: Server, tmp_path: Path, authority: Path) -> None:
    other = make_key(tmp_path / "other_ca")
    certified.known_hosts.write_text(trust(certified, other))
    assert (
        "no @cert-authority line for this host has the key that signed it"
        in refused(certified, certified.add_alias("node0")).message
    )
    # The plain key of a host with a certificate counts as that of any other.
    with certified.known_hosts.open("a") as f:
        f.write(known_host("127.0.0.1", certified.port, certified.host_key))
    both_get_in(certified, "node0")


def test_an_authority_whose_algorithm_is_not_allowed(certified: Server, authority: Path) -> None:
    certified.known_hosts.write_text(trust(certified, authority))
    assert (
        "CASignatureAlgorithms does not allow its signature"
        in refused(certified, certified.add_alias("node0", "CASignatureAlgorithms rsa-sha2-512")).message
    )


def test_certificates_of_all_kinds_of_keys(tmp_path: Path) -> None:
    for number, (kind, by) in enumerate([("rsa", "ecdsa"), ("ecdsa", "rsa")]):
        made = tmp_path / str(number)
        made.mkdir()
        for name, which in (("ca", by), ("key", kind)):
            subprocess.run(["ssh-keygen", "-q", "-t", which, "-N", "", "-f", str(made / name)], check=True)
        certificate = sign(made / "ca", made / "key.pub", "-h", "-n", "127.0.0.1")
        with run_sshd(made / "server", f"HostKey {made}/key", f"HostCertificate {certificate}") as server:
            server.known_hosts.write_text(trust(server, made / "ca"))
            both_get_in(server, server.add_alias("node0"))


# Revoked.


@pytest.mark.parametrize("what", ["key", "authority"])
@pytest.mark.parametrize("form", ["@revoked", "list", "KRL"])
def test_revoked_keys_and_authorities_are_refused(
    certified: Server, tmp_path: Path, authority: Path, what: str, form: str
) -> None:
    public = Path(f"{authority if what == 'authority' else certified.host_key}.pub")
    certified.known_hosts.write_text(trust(certified, authority))
    lines: tuple[str, ...] = (f"RevokedHostKeys {tmp_path}/revoked",)
    if form == "@revoked":
        lines = ()
        with certified.known_hosts.open("a") as f:
            f.write(f"@revoked * {fingerprint_line(public)}\n")
    elif form == "list":
        (tmp_path / "revoked").write_text(f"# gone\n\n{public.read_text()}")
    else:
        subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(tmp_path / "revoked"), str(public)], check=True)
    error = refused(certified, certified.add_alias("node0", *lines))
    assert "revoked" in error.message
    assert ("(RevokedHostKeys)" in error.message) is (form != "@revoked")


def test_a_certificate_revoked_by_its_number(certified: Server, tmp_path: Path, authority: Path) -> None:
    (tmp_path / "spec").write_text("serial: 7\n")
    made = ["ssh-keygen", "-q", "-k", "-s", f"{authority}.pub", "-f", str(tmp_path / "krl"), str(tmp_path / "spec")]
    subprocess.run(made, check=True)
    certified.known_hosts.write_text(trust(certified, authority))
    error = refused(certified, certified.add_alias("node0", f"RevokedHostKeys {tmp_path}/krl"))
    assert error.message == f"its host key was revoked in {tmp_path}/krl (RevokedHostKeys)."


def test_a_revocation_list_without_this_key_changes_nothing(sshd: Server, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    both_get_in(sshd, sshd.add_alias("node0", f'RevokedHostKeys "{other}.pub"'))
    subprocess.run(["ssh-keygen", "-q", "-k", "-f", str(tmp_path / "a krl"), f"{other}.pub"], check=True)
    both_get_in(sshd, sshd.add_alias("node1", f'RevokedHostKeys "{tmp_path}/a krl"'))


def test_what_the_hint_about_a_revoked_key_says_mends_it(sshd: Server, tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text(Path(f"{sshd.host_key}.pub").read_text())
    error = refused(sshd, sshd.add_alias("node0", f"RevokedHostKeys {revoked}"))
    assert error.hint == f"give the host a new key; if this one is right, correct {revoked}"
    with run_sshd(tmp_path / "new_key") as server:
        both_get_in(server, server.add_alias("node0", f"RevokedHostKeys {revoked}"))
    revoked.write_text(Path(f"{make_key(tmp_path / 'other')}.pub").read_text())
    both_get_in(sshd, "node0")


@pytest.mark.parametrize("text", [None, b"not a key\n", b"SSHKRL\n\0broken"])
def test_a_revocation_list_that_cannot_be_read_refuses_all(sshd: Server, tmp_path: Path, text: bytes | None) -> None:
    if text is not None:
        (tmp_path / "revoked").write_bytes(text)
    error = refused(sshd, sshd.add_alias("node0", f"RevokedHostKeys {tmp_path}/revoked"))
    assert "cannot be checked" in error.message
    assert "(RevokedHostKeys)" in error.message


def test_a_revoked_key_is_refused_whatever_strict_host_key_checking_says(sshd: Server, tmp_path: Path) -> None:
    known = tmp_path / "known"
    line = known_host("127.0.0.1", sshd.port, sshd.host_key)
    known.write_text(f"{line}@revoked {line}")
    sshd.add_alias("node0", f"UserKnownHostsFile {known}", "StrictHostKeyChecking no")
    error = compare(sshd, "node0", "StrictHostKeyChecking")
    assert isinstance(error, HostKeyError)


# Where known keys are.


@pytest.mark.parametrize("where", ["UserKnownHostsFile", "GlobalKnownHostsFile"])
def test_files_with_blanks_and_several_files(sshd: Server, tmp_path: Path, where: str) -> None:
    place = tmp_path / "Application Support"
    place.mkdir()
    (place / "known hosts").write_text(sshd.known_hosts.read_text())
    (tmp_path / "Application").write_text("")
    other = "GlobalKnownHostsFile none" if where.startswith("User") else "UserKnownHostsFile none"
    for number, value in enumerate((f'"{place}/known hosts"', f'{tmp_path}/none "{place}/known hosts" {tmp_path}/x')):
        both_get_in(sshd, sshd.add_alias(f"node{number}", f"{where} {value}", other))


def test_a_known_hosts_command_gives_keys_authorities_and_revoked_ones(
    certified: Server, tmp_path: Path, authority: Path
) -> None:
    script, said = tmp_path / "say it", tmp_path / "said"
    script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\ncat {said}\n')
    script.chmod(0o755)
    line = f'KnownHostsCommand "{script}" %I %H %h %t %f %K %n %p %r %%'
    certified.add_alias("node0", line, "UserKnownHostsFile none")
    for text, works in (
        (known_host("127.0.0.1", certified.port, certified.host_key), True),
        (trust(certified, authority), True),
        ("", False),
        (trust(certified, authority) + f"@revoked * {fingerprint_line(Path(f'{authority}.pub'))}\n", False),
    ):
        said.write_text(text)
        if works:
            both_get_in(certified, "node0")
        else:
            refused(certified)
    log = (tmp_path / "log").read_text().splitlines()
    assert any(words.startswith(f"ORDER [127.0.0.1]:{certified.port} 127.0.0.1 NONE NONE NONE node0") for words in log)
    asked = {words for words in log if words.startswith("HOSTNAME")}
    assert len(asked) == 2  # ssh and moectl ask in the same words, for the plain key and for the certificate
    said.write_text(known_host("127.0.0.1", certified.port, make_key(tmp_path / "other")))
    error = refused(certified)
    assert error.message == "host key changed since you last connected."
    assert error.hint == "correct what KnownHostsCommand prints for this host"
    said.write_text(known_host("127.0.0.1", certified.port, certified.host_key))
    both_get_in(certified, "node0")


def test_a_known_hosts_command_that_fails_is_named(sshd: Server, tmp_path: Path) -> None:
    script = tmp_path / "fails"
    script.write_text(f"#!/bin/sh\ncat {sshd.known_hosts}\necho no ticket >&2\nexit 4\n")
    script.chmod(0o755)
    error = refused(sshd, sshd.add_alias("node0", f"KnownHostsCommand {script}"))
    assert error.message == f"its KnownHostsCommand ({script}) failed: exit code 4: no ticket"
    missing = compare(sshd, sshd.add_alias("node1", "KnownHostsCommand /nowhere/at/all"), "KnownHostsCommand")
    assert isinstance(missing, HostKeyError)  # ssh goes on with what the files say
    assert "/nowhere/at/all" in missing.message


# What the hints say, done.


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("StrictHostKeyChecking yes",),
        ("StrictHostKeyChecking no",),
        ("StrictHostKeyChecking accept-new", "BatchMode yes"),
        ("NoHostAuthenticationForLocalhost yes",),
        ("VerifyHostKeyDNS yes",),
    ],
    ids=" ".join,
)
def test_the_hint_for_an_unknown_key_makes_it_known(sshd: Server, tmp_path: Path, lines: tuple[str, ...]) -> None:
    sshd.add_alias("node0", *lines, f"UserKnownHostsFile {tmp_path}/new")
    error = ask_moectl(sshd.config, "node0")
    assert isinstance(error, HostKeyError)
    assert error.hint is not None
    answer_yes(error.hint.split("'")[1])
    both_get_in(sshd, "node0")


@pytest.mark.parametrize("nowhere", ["none", "/dev/null"])
def test_where_ssh_keeps_no_keys_the_hint_says_so(sshd: Server, tmp_path: Path, nowhere: str) -> None:
    sshd.add_alias("node0", f"UserKnownHostsFile {nowhere}", "StrictHostKeyChecking no")
    error = compare(sshd, "node0", "StrictHostKeyChecking")
    assert error is not None
    assert error.hint is not None
    assert error.hint.startswith("give it a UserKnownHostsFile in ~/.ssh/config")
    sshd.config.write_text("")
    sshd.add_alias("node0", f"UserKnownHostsFile {tmp_path}/new", "StrictHostKeyChecking no")
    answer_yes(error.hint.split("'")[1])
    both_get_in(sshd, "node0")


def test_another_key_under_the_name_without_the_port_is_not_a_changed_one(sshd: Server, tmp_path: Path) -> None:
    known = tmp_path / "known"
    known.write_text(known_host("127.0.0.1", 22, make_key(tmp_path / "other")))
    error = refused(sshd, sshd.add_alias("node0", f"UserKnownHostsFile {known}"))
    assert "its host key is not known here" in error.message
    assert error.hint is not None
    answer_yes(error.hint.split("'")[1])
    both_get_in(sshd, "node0")


def test_a_short_rsa_key_of_a_host_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "short"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(key)], check=True)
    with run_sshd(tmp_path / "server", f"HostKey {key}") as server:
        server.known_hosts.write_text(known_host("127.0.0.1", server.port, key))
        sizes = server.add_alias("node0", "RequiredRSASize 3072", "HostKeyAlgorithms rsa-sha2-512")
        error = both_refuse(server, sizes)
        assert "its RSA key has 2048 bits, and RequiredRSASize is 3072" in error.message
        both_get_in(server, server.add_alias("node1", "HostKeyAlgorithms rsa-sha2-512"))
    # What the hint says, done under another root.
    assert error.hint == "give the host a larger key or an ed25519 one: on it, run 'ssh-keygen -A'"
    made = tmp_path / "etc" / "ssh"
    made.mkdir(parents=True)
    subprocess.run([*error.hint.split("'")[1].split(), "-f", str(tmp_path)], check=True, capture_output=True)
    for kind, algorithm in (("rsa", "rsa-sha2-512"), ("ed25519", "ssh-ed25519")):
        key = made / f"ssh_host_{kind}_key"
        with run_sshd(tmp_path / kind, f"HostKey {key}") as server:
            server.known_hosts.write_text(known_host("127.0.0.1", server.port, key))
            both_get_in(server, server.add_alias("node0", "RequiredRSASize 3072", f"HostKeyAlgorithms {algorithm}"))


@pytest.mark.netns
def test_check_host_ip_refuses_another_key_for_the_address(sshd: Server, tmp_path: Path) -> None:
    added = subprocess.run(["ip", "address", "add", "192.0.2.77/32", "dev", "lo"], capture_output=True)
    assert added.returncode == 0, added.stderr
    try:
        with run_sshd(tmp_path / "server", "ListenAddress 192.0.2.77") as server:
            known, other = tmp_path / "known", make_key(tmp_path / "other")
            known.write_text(
                known_host("mac1.test", server.port, server.host_key) + known_host("192.0.2.77", server.port, other)
            )
            lines = (f"UserKnownHostsFile {known}", "HostKeyAlias mac1.test", "HostName 192.0.2.77")
            known.write_text(known.read_text().replace(f"[mac1.test]:{server.port}", "mac1.test"))
            server.add_alias("node0", *lines)
            server.add_alias("node1", "CheckHostIP yes", *lines)
            both_get_in(server, "node0")
            error = refused(server, "node1")
            assert error.message == "another host key is known for its address 192.0.2.77 (CheckHostIP)."
            assert error.hint is not None
            subprocess.run(error.hint.split("'", 1)[1].rsplit("'", 1)[0], shell=True, check=True, capture_output=True)
            both_get_in(server, "node1")
    finally:
        subprocess.run(["ip", "address", "del", "192.0.2.77/32", "dev", "lo"], check=True)
