"""Every keyword of ssh's configuration: the real ssh beside moectl, row by row of the table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moectl.errors import HostError
from moectl.hosts.hostfile import Host
from moectl.hosts.ssh.config import read_ssh_settings
from moectl.hosts.ssh.keywords import KEYWORDS, TABLE, KeywordVerdict
from moectl.hosts.ssh.remote import SSHRemote
from tests.support.beside import ask_moectl, ask_ssh, both_get_in, both_refuse
from tests.support.sshd import Server, find_free_port, run_sshd

# What each row is set to: other values than ssh's own. {known} is a file with the host's key, {new} none yet.
SAMPLES: dict[str, tuple[str, ...]] = {
    "Host": (),  # the alias itself
    "User": ("no-such-user",),
    "Hostname": ("localhost", "no-such-host.invalid"),
    "Port": ("{free}",),
    "AddressFamily": ("inet", "inet6"),
    "BindAddress": ("127.0.0.2", "203.0.113.9"),
    "ConnectTimeout": ("3",),
    "ConnectionAttempts": ("2",),
    "CanonicalizeHostname": ("yes", "always"),
    "CanonicalizeFallbackLocal": ("no",),
    "CanonicalizeMaxDots": ("0",),
    "CanonicalizePermittedCNAMEs": ("*.example.com:*.example.org",),
    "CanonicalDomains": ("example.com",),
    "IgnoreUnknown": ("SomethingElse",),
    "Tag": ("work",),
    "ProxyJump": ("jump", "jump-%n", "%r@jump", "nowhere"),
    "ProxyCommand": ("{python} {relay} %h %p", "exit 7"),
    "IdentityFile": ("/nowhere",),
    "CertificateFile": ("/nowhere",),
    "IdentitiesOnly": ("no",),
    "IdentityAgent": ("/nowhere", "$NOWHERE"),
    "PubkeyAcceptedAlgorithms": ("ssh-ed25519", "rsa-sha2-512"),
    "PubkeyAcceptedKeyTypes": ("ssh-ed25519", "rsa-sha2-512"),
    "RequiredRSASize": ("4096",),
    "Ciphers": ("aes128-ctr", "chacha20-poly1305@openssh.com", "-aes*"),
    "MACs": ("hmac-sha2-512", "umac-64@openssh.com"),
    "KexAlgorithms": ("curve25519-sha256", "sntrup761x25519-sha512@openssh.com", "diffie-hellman-group18-sha512"),
    "HostKeyAlgorithms": ("ssh-ed25519", "rsa-sha2-512", "sk-ssh-ed25519@openssh.com"),
    "CASignatureAlgorithms": ("rsa-sha2-512",),
    "UserKnownHostsFile": ("none", "{new}", "{new} {known}"),
    "GlobalKnownHostsFile": ("{known}\nUserKnownHostsFile none", "{new}\nUserKnownHostsFile none"),
    "HostKeyAlias": ("other",),
    "CheckHostIP": ("yes",),
    "RevokedHostKeys": ("{host_key}.pub", "/nowhere"),
    "KnownHostsCommand": ("/bin/cat {known}\nUserKnownHostsFile none", "/bin/true", "/bin/false"),
    "SetEnv": ("MOE_A=b",),
    "SendEnv": ("MOE_*",),
    "AddKeysToAgent": ("yes",),
    "BatchMode": ("yes",),
    "ChallengeResponseAuthentication": ("no",),
    "ChannelTimeout": ("session=1h",),
    "ClearAllForwardings": ("yes",),
    "Compression": ("yes",),
    "ControlMaster": ("auto",),
    "ControlPersist": ("1",),
    "DynamicForward": ("{free}",),
    "EnableEscapeCommandline": ("yes",),
    "EnableSSHKeysign": ("yes",),
    "EscapeChar": ("none",),
    "ExitOnForwardFailure": ("yes",),
    "FingerprintHash": ("md5",),
    "ForkAfterAuthentication": ("no",),
    "ForwardAgent": ("yes",),
    "ForwardX11": ("yes",),
    "ForwardX11Timeout": ("60",),
    "ForwardX11Trusted": ("no",),
    "GatewayPorts": ("yes",),
    "GSSAPIClientIdentity": ("me",),
    "GSSAPIDelegateCredentials": ("yes",),
    "GSSAPIKexAlgorithms": ("gss-group14-sha256-",),
    "GSSAPIRenewalForcesRekey": ("yes",),
    "GSSAPIServerIdentity": ("it",),
    "GSSAPITrustDns": ("yes",),
    "HashKnownHosts": ("yes",),
    "HostbasedAcceptedAlgorithms": ("ssh-ed25519",),
    "HostbasedKeyTypes": ("ssh-ed25519",),
    "IPQoS": ("none",),
    "KbdInteractiveAuthentication": ("no",),
    "KbdInteractiveDevices": ("pam",),
    "LocalCommand": ("true",),
    "LocalForward": ("{free} 127.0.0.1:1",),
    "LogLevel": ("QUIET",),
    "LogVerbose": ("kex.c:*:1000",),
    "NumberOfPasswordPrompts": ("0",),
    "ObscureKeystrokeTiming": ("no",),
    "PasswordAuthentication": ("no",),
    "PermitLocalCommand": ("yes",),
    "PermitRemoteOpen": ("none",),
    "RekeyLimit": ("1G 1h",),
    "RemoteForward": ("{free} 127.0.0.1:1",),
    "RequestTTY": ("force",),
    "ServerAliveCountMax": ("5",),
    "ServerAliveInterval": ("5",),
    "StdinNull": ("yes",),
    "StreamLocalBindMask": ("0077",),
    "StreamLocalBindUnlink": ("yes",),
    "SyslogFacility": ("AUTH",),
    "TCPKeepAlive": ("no",),
    "Tunnel": ("no\nTunnelDevice 9:9",),
    "TunnelDevice": ("9:9",),
    "UpdateHostKeys": ("no",),
    "VersionAddendum": ("hello",),
    "VisualHostKey": ("yes",),
    "WarnWeakCrypto": ("no",),
    "XAuthLocation": ("/nowhere",),
    "BindInterface": ("lo",),
    "ProxyUseFdpass": ("yes",),
    "PubkeyAuthentication": ("no", "yes"),
    "PreferredAuthentications": ("password", "gssapi-with-mic,publickey"),
    "RemoteCommand": ("true", "none"),
    "SessionType": ("subsystem", "default"),
    "ControlPath": ("{new}",),
    "GSSAPIAuthentication": ("yes",),
    "HostbasedAuthentication": ("yes",),
    "PKCS11Provider": ("/nowhere.so",),
    "SecurityKeyProvider": ("/nowhere.so",),
    "UseKeychain": ("yes",),
    "GSSAPIKeyExchange": ("yes",),
    "NoHostAuthenticationForLocalhost": ("yes", "yes\nUserKnownHostsFile {new}"),
    "StrictHostKeyChecking": ("yes", "no", "no\nUserKnownHostsFile {new}", "accept-new\nUserKnownHostsFile {new}"),
    "VerifyHostKeyDNS": ("yes", "ask\nUserKnownHostsFile {new}"),
}

RELAY = """import os, socket, sys, threading
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
def up():
    while d := os.read(0, 65536): s.sendall(d)
    os._exit(0)
threading.Thread(target=up, daemon=True).start()
while d := s.recv(65536): os.write(1, d)
"""


def test_the_table_has_every_keyword_that_this_ssh_prints() -> None:
    done = subprocess.run(["ssh", "-G", "-F", "none", "host"], capture_output=True, text=True, check=True)
    printed = {line.split()[0].lower() for line in done.stdout.splitlines()}
    assert printed <= TABLE.keys()
    assert len(TABLE) == len(KEYWORDS)
    assert SAMPLES.keys() == {row.name for row in KEYWORDS}


def fill(sshd: Server, tmp_path: Path, text: str) -> list[str]:
    """Return the lines of a sample, and put what it names in place."""
    (tmp_path / "relay.py").write_text(RELAY)
    (tmp_path / "new").unlink(missing_ok=True)  # what the one writes is not there for the other
    places = {"known": sshd.known_hosts, "new": tmp_path / "new", "host_key": sshd.host_key, "free": find_free_port()}
    return text.format(**places, python=sys.executable, relay=tmp_path / "relay.py").split("\n")


def come_to_the_same_verdict(sshd: Server, tmp_path: Path, keyword: str, value: str) -> None:
    sshd.add_alias("jump")
    sshd.add_alias("jump-node0")
    start = sshd.config.read_text()
    sshd.add_alias("node0", *fill(sshd, tmp_path, f"{keyword} {value}"))
    theirs = ask_ssh(sshd.config, "node0").returncode == 0
    sshd.config.write_text(start)
    sshd.add_alias("node0", *fill(sshd, tmp_path, f"{keyword} {value}"))
    error = ask_moectl(sshd.config, "node0")
    if error is None:
        assert theirs, "moectl gets in, ssh does not"
    elif theirs:
        assert keyword.lower() in f"{error} {error.hint}".lower(), f"ssh gets in: {error} ({error.hint})"
    if TABLE[keyword.lower()].verdict in (KeywordVerdict.HARMLESS, KeywordVerdict.LOGIN):
        assert (error is None) == theirs


def samples(*verdicts: KeywordVerdict) -> list[tuple[str, str]]:
    return [(row.name, value) for row in KEYWORDS if row.verdict in verdicts for value in SAMPLES[row.name]]


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        pytest.param(*sample, marks=[pytest.mark.long] if number % 3 else [])
        for number, sample in enumerate(
            samples(KeywordVerdict.HONOURED, KeywordVerdict.REFUSED, KeywordVerdict.LOGIN, KeywordVerdict.TRUST)
        )
    ],
)
def test_ssh_and_moectl_come_to_the_same_verdict(sshd: Server, tmp_path: Path, keyword: str, value: str) -> None:
    come_to_the_same_verdict(sshd, tmp_path, keyword, value)


@pytest.mark.long
@pytest.mark.parametrize(("keyword", "value"), samples(KeywordVerdict.HARMLESS))
def test_what_is_harmless_changes_no_verdict(sshd: Server, tmp_path: Path, keyword: str, value: str) -> None:
    come_to_the_same_verdict(sshd, tmp_path, keyword, value)


def test_all_that_is_harmless_at_once_changes_no_verdict(sshd: Server, tmp_path: Path) -> None:
    known = subprocess.run(["ssh", "-G", "-F", "none", "host"], capture_output=True, text=True, check=True).stdout
    printed = {line.split()[0].lower() for line in known.splitlines()}
    lines = [f"{name} {value}" for name, value in samples(KeywordVerdict.HARMLESS) if name.lower() in printed]
    assert len(lines) > 30
    both_get_in(sshd, sshd.add_alias("node0", *(line for text in lines for line in fill(sshd, tmp_path, text))))


@pytest.mark.parametrize("name", [row.name for row in KEYWORDS if row.verdict is KeywordVerdict.REFUSED])
def test_what_is_refused_names_the_keyword_and_its_hint_mends_it(sshd: Server, name: str) -> None:
    mended = {
        "BindInterface": ("lo", "BindAddress 127.0.0.1"),
        "ProxyUseFdpass": ("yes", "ProxyUseFdpass no"),
        "PubkeyAuthentication": ("no", "PubkeyAuthentication yes"),
        "PreferredAuthentications": ("password", "PreferredAuthentications password,publickey"),
        "RemoteCommand": ("uptime", "RemoteCommand none"),
        "SessionType": ("subsystem", "SessionType default"),
    }
    value, line = mended[name]
    sshd.add_alias("node0", f"{name} {value}")
    error = ask_moectl(sshd.config, "node0")
    assert isinstance(error, HostError)
    assert error.message.startswith(f"{name} ")
    assert "is set for it" in error.message
    assert error.hint is not None
    assert line.split()[0] in error.hint
    sshd.config.write_text("")
    both_get_in(sshd, sshd.add_alias("node0", line))


def test_a_keyword_of_a_later_ssh_is_refused_where_it_is_set(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run(["sh", "-c", "command -v ssh"], capture_output=True, text=True, check=True).stdout.strip()
    later = tmp_path / "bin" / "ssh"
    later.parent.mkdir()
    value = tmp_path / "value"
    later.write_text(
        f'#!/bin/sh\n{real} "$@" || exit\ncase "$*" in *"-F none"*) echo trustanyhost no;; '
        f"*) echo trustanyhost $(cat {value});; esac\n"
    )
    later.chmod(0o755)
    monkeypatch.setenv("PATH", str(later.parent), prepend=":")
    sshd.add_alias("node0")
    value.write_text("no")
    assert ask_moectl(sshd.config, "node0") is None
    value.write_text("yes")
    error = ask_moectl(sshd.config, "node0")
    assert error is not None
    assert "trustanyhost yes is set for it, a keyword that this moectl does not know" in error.message
    assert error.hint == "remove trustanyhost for this host (~/.ssh/config), or install a newer moectl"
    value.write_text("no")  # as it prints where it is left out
    assert ask_moectl(sshd.config, "node0") is None


def test_without_ssh_the_hint_says_what_to_install(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = {name: shutil.which(name) for name in ("ssh", "ssh-keygen")}
    sshd.add_alias("node0")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    error = ask_moectl(sshd.config, "node0")
    assert error is not None
    assert (error.message, error.hint) == ("ssh is not installed here", "install OpenSSH's client")
    for name, path in client.items():
        (tmp_path / "bin" / name).symlink_to(str(path))
    assert ask_moectl(sshd.config, "node0") is None


def test_an_option_that_this_ssh_does_not_know_is_quoted_and_the_hint_mends_it(sshd: Server) -> None:
    sshd.add_alias("node0", "UseKeychainToo yes", "AnotherOne yes")
    sshd.config.write_text("IgnoreUnknown SomethingElse\nSomethingElse yes\n" + sshd.config.read_text())
    error = both_refuse(sshd, "node0")
    assert f"{sshd.config}: line 4: Bad configuration option: usekeychaintoo (2 such lines)" in error.message
    assert error.hint is not None
    line = error.hint.split("'")[1]
    assert line == "IgnoreUnknown SomethingElse,UseKeychainToo,AnotherOne"
    sshd.config.write_text(f"{line}\n{sshd.config.read_text()}")
    both_get_in(sshd, "node0")


@pytest.mark.parametrize("token", ["%C", "%d", "%h", "%i", "%k", "%L", "%l", "%n", "%p", "%r", "%u", "%%"])
def test_every_token_means_what_it_means_to_ssh(sshd: Server, token: str) -> None:
    sshd.add_alias("node0", f"ControlPath x{token}", f"IdentityFile x{token}", "HostKeyAlias other")
    settings = read_ssh_settings("node0")
    assert str(settings.identity_files[0]) == settings.values["controlpath"]  # which ssh -G fills in itself


@pytest.mark.parametrize(
    "line",
    [
        "IdentityFile /x%Z",
        "IdentityFile /x${{MOE_NOWHERE}}",
        "CertificateFile /x%Z",
        "ProxyCommand nc %Z",
        "ProxyJump %Z",
    ],
)
def test_a_token_that_is_unknown_is_named(sshd: Server, line: str) -> None:
    sshd.add_alias("node0", line.replace("{{", "{").replace("}}", "}"))
    error = both_refuse(sshd, "node0")
    assert line.split()[0] in error.message


def test_a_hop_that_is_no_host_is_named(sshd: Server) -> None:
    sshd.add_alias("node0", "ProxyJump a:b:c:d")
    error = both_refuse(sshd, "node0")
    assert "roxyjump" in str(error).lower()
    assert "--hosts" not in str(error)


def test_a_proxy_command_that_fails_is_named_with_its_last_words(sshd: Server) -> None:
    sshd.add_alias("node0", "ProxyCommand sh -c 'echo first >&2; echo your login has expired >&2; exit 3'")
    error = both_refuse(sshd, "node0")
    assert error.message == "its ProxyCommand ended with exit code 3: your login has expired"


def test_a_proxy_command_is_run_by_the_users_shell(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "relay.py").write_text(RELAY)
    shell = tmp_path / "shell"
    shell.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && [ "$2" = "exec go" ] && exec {sys.executable} {tmp_path}/relay.py '
        f'127.0.0.1 {sshd.port}\nexec /bin/sh "$@"\n'
    )
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    both_get_in(sshd, sshd.add_alias("node0", "ProxyCommand go"))


def test_what_set_env_and_send_env_send_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SENT", "from here")
    monkeypatch.setenv("LC_ALL", "C")
    with run_sshd(tmp_path / "server", "AcceptEnv MOE_* LC_*") as server:
        server.add_alias("node0", "SetEnv MOE_SET=1=2", "SendEnv MOE_* LC_*")
        show = 'echo "$MOE_SENT,$MOE_SET"'
        theirs = subprocess.run(["ssh", "-F", str(server.config), "node0", show], capture_output=True, check=True)
        remote = SSHRemote(Host("node0"), config=str(server.config))
        assert remote.run(["sh", "-c", show]).stdout == theirs.stdout == b"from here,1=2\n"
        assert remote.run(["sh", "-c", "echo $LC_ALL"]).stdout == b"\n"  # the language of this terminal stays here
        remote.close()


@pytest.mark.parametrize(
    ("wrong", "hint", "right"),
    [
        ("BindAddress 192.0.2.1", "correct BindAddress in ~/.ssh/config", "BindAddress 127.0.0.1"),
        ("IdentityFile ~/.ssh/%Z", "correct IdentityFile in ~/.ssh/config; a percent sign", "IdentityFile ~/.ssh/%%Z"),
        ("IdentityFile ${MOE_NO}/key", "set it, or correct IdentityFile", "IdentityFile ~/.ssh/key"),
        (
            "HostKeyAlgorithms rsa-sha2-512",
            "add ssh-ed25519 to HostKeyAlgorithms in ~/.ssh/config",
            "HostKeyAlgorithms rsa-sha2-512,ssh-ed25519",
        ),
        ("ProxyCommand false", "this has to greet with SSH-2.0: false", "ProxyCommand none"),
        ("KnownHostsCommand /bin/false", "correct KnownHostsCommand in ~/.ssh/config", "KnownHostsCommand /bin/true"),
        ("Port many", "correct ", "Compression no"),
        (
            "ProxyJump a@b@c",
            "correct ProxyJump in ~/.ssh/config; it takes the tokens %%, %h, %n, %p and %r",
            "ProxyJump none",
        ),
    ],
)
def test_what_a_hint_about_the_configuration_says_mends_it(sshd: Server, wrong: str, hint: str, right: str) -> None:
    error = both_refuse(sshd, sshd.add_alias("node0", wrong))
    assert str(error.hint).startswith(hint)
    sshd.config.write_text("")
    both_get_in(sshd, sshd.add_alias("node0", right))
