"""Every keyword that `ssh -G` prints, OpenSSH 8.0 to 10.5, and what moectl does where it is set.

Data only: `ssh.config` refuses, `ssh.login` and `ssh.trust` name in errors what they did not use. The names come from
readconf.c (dump_client_config), from Debian's and Fedora's GSSAPI patch and from Apple's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class KeywordVerdict(Enum):
    HONOURED = "as ssh does"
    HARMLESS = "nothing that moectl does depends on it"
    REFUSED = "refused by name before anything is connected"
    LOGIN = "another way to log in: named when no key was accepted"
    TRUST = "another way to trust a host: moectl does not use it, and names it when it refuses a host key"


@dataclass(frozen=True, slots=True)
class Keyword:
    name: str
    since: str  # version of OpenSSH whose `ssh -G` prints it first; 8.0 stands for all before as well
    verdict: KeywordVerdict
    words: str  # how it is honoured, why it is harmless, or what an error says of it
    unset: str = ""  # regular expression of the values that change nothing; for the last three verdicts
    hint: str = ""  # for REFUSED


def _rows(verdict: KeywordVerdict, text: str) -> list[Keyword]:
    """Read `name since words`, one keyword a line."""
    found = (line.split(None, 2) for line in text.strip().splitlines())
    return [Keyword(name, since, verdict, words) for name, since, words in found]


_NO = "no|false"
_YES = "yes|true"

KEYWORDS: tuple[Keyword, ...] = (
    *_rows(
        KeywordVerdict.HONOURED,
        """
        Host                         9.2  the name as typed
        User                         8.0  the login name
        Hostname                     8.0  where to connect
        Port                         8.0  where to connect
        AddressFamily                8.0  which addresses of the name are tried
        BindAddress                  8.0  the address to connect from
        ConnectTimeout               8.0  for one attempt; 10 s where it is not set
        ConnectionAttempts           8.0  as many attempts, a second apart
        CanonicalizeHostname         8.0  ssh -G did it
        CanonicalizeFallbackLocal    8.0  ssh -G did it
        CanonicalizeMaxDots          8.0  ssh -G did it
        CanonicalizePermittedCNAMEs  8.0  ssh -G did it
        CanonicalDomains             8.0  ssh -G did it
        IgnoreUnknown                8.0  ssh -G did it
        Tag                          9.4  ssh -G did it (Match tagged)
        ProxyJump                    8.0  hop by hop, with its tokens
        ProxyCommand                 8.0  run by $SHELL, with its tokens
        IdentityFile                 8.0  private keys and public keys of an agent, with tokens
        CertificateFile              8.0  offered with its key, from a file or an agent
        IdentitiesOnly               8.0  other keys of an agent are not offered
        IdentityAgent                8.0  none, SSH_AUTH_SOCK, $VARIABLE, a path
        PubkeyAcceptedAlgorithms     8.5  other keys are not offered
        PubkeyAcceptedKeyTypes       8.0  the name of PubkeyAcceptedAlgorithms until 8.4
        RequiredRSASize              9.1  for keys of both sides
        Ciphers                      8.0  those of them that paramiko has, AES-GCM first
        MACs                         8.0  those of them that paramiko has
        KexAlgorithms                8.0  those of them that paramiko has
        HostKeyAlgorithms            8.0  those of them that paramiko has, known ones first
        CASignatureAlgorithms        8.0  for certificates of hosts
        UserKnownHostsFile           8.0  all files, with @cert-authority, @revoked and hashed names
        GlobalKnownHostsFile         8.0  all files
        HostKeyAlias                 8.0  the name that is looked up
        CheckHostIP                  8.0  another key known for the address is refused
        RevokedHostKeys              8.0  lists of keys and KRLs, all files
        KnownHostsCommand            8.5  run, with its tokens
        SetEnv                       8.0  sent for each command
        SendEnv                      8.0  sent for each command, except the language of this terminal (LANG, LC_*)
        """,
    ),
    *_rows(
        KeywordVerdict.HARMLESS,
        """
        AddKeysToAgent               8.0  moectl unlocks no key
        BatchMode                    8.0  moectl never asks
        ChallengeResponseAuthentication 8.0 moectl gives no passwords
        ChannelTimeout               9.6  moectl's own heartbeats keep its channels busy
        ClearAllForwardings          8.0  moectl forwards nothing
        Compression                  8.0  the bytes are the same
        ControlMaster                8.0  moectl's connections are its own
        ControlPersist               8.0  moectl's connections are its own
        DynamicForward               8.0  moectl forwards nothing
        EnableEscapeCommandline      9.2  for a terminal
        EnableSSHKeysign             8.0  a setting of ssh-keysign
        EscapeChar                   8.0  for a terminal
        ExitOnForwardFailure         8.0  moectl forwards nothing
        FingerprintHash              8.0  moectl shows SHA256
        ForkAfterAuthentication      8.7  moectl waits for its commands
        ForwardAgent                 8.0  moectl forwards no agent
        ForwardX11                   8.0  moectl forwards nothing
        ForwardX11Timeout            8.0  moectl forwards nothing
        ForwardX11Trusted            8.0  moectl forwards nothing
        GatewayPorts                 8.0  moectl forwards nothing
        GSSAPIClientIdentity         8.0  see GSSAPIAuthentication
        GSSAPIDelegateCredentials    8.0  see GSSAPIAuthentication
        GSSAPIKexAlgorithms          8.0  see GSSAPIKeyExchange
        GSSAPIRenewalForcesRekey     8.0  see GSSAPIKeyExchange
        GSSAPIServerIdentity         8.0  see GSSAPIAuthentication
        GSSAPITrustDns               8.0  see GSSAPIAuthentication
        HashKnownHosts               8.0  moectl writes no known_hosts
        HostbasedAcceptedAlgorithms  8.5  see HostbasedAuthentication
        HostbasedKeyTypes            8.0  see HostbasedAuthentication
        IPQoS                        8.0  marks of packets
        KbdInteractiveAuthentication 8.0  moectl gives no passwords
        KbdInteractiveDevices        8.0  moectl gives no passwords
        LocalCommand                 8.0  moectl runs nothing here once it is connected
        LocalForward                 8.0  moectl forwards nothing
        LogLevel                     8.0  ssh's own messages
        LogVerbose                   8.5  ssh's own messages
        NumberOfPasswordPrompts      8.0  moectl gives no passwords
        ObscureKeystrokeTiming       9.5  for a terminal
        PasswordAuthentication       8.0  moectl gives no passwords
        PermitLocalCommand           8.0  moectl runs nothing here once it is connected
        PermitRemoteOpen             8.5  moectl forwards nothing
        RekeyLimit                   8.0  paramiko changes its keys every 512 MB
        RemoteForward                8.0  moectl forwards nothing
        RequestTTY                   8.0  moectl needs no terminal there
        ServerAliveCountMax          8.0  moectl has its own signs of life
        ServerAliveInterval          8.0  moectl has its own signs of life
        StdinNull                    8.7  moectl's commands have their own stdin
        StreamLocalBindMask          8.0  moectl forwards nothing
        StreamLocalBindUnlink        8.0  moectl forwards nothing
        SyslogFacility               8.0  ssh's own messages
        TCPKeepAlive                 8.0  moectl has its own signs of life
        Tunnel                       8.0  moectl forwards nothing
        TunnelDevice                 8.0  moectl forwards nothing
        UpdateHostKeys               8.0  moectl writes no known_hosts
        VersionAddendum              10.0 a word in ssh's greeting
        VisualHostKey                8.0  ssh's own messages
        WarnWeakCrypto               10.1 ssh's own messages
        XAuthLocation                8.0  moectl forwards nothing
        """,
    ),
    # Refused: here ssh would behave differently from moectl.
    Keyword(
        "BindInterface",
        "8.0",
        KeywordVerdict.REFUSED,
        "moectl cannot choose an interface by its name",
        "none",
        "set BindAddress to the address of that interface instead",
    ),
    Keyword(
        "ProxyUseFdpass",
        "8.0",
        KeywordVerdict.REFUSED,
        "moectl talks to a ProxyCommand over its stdin and stdout",
        _NO,
        "set 'ProxyUseFdpass no', and take a ProxyCommand that relays (nc without -F)",
    ),
    Keyword(
        "PubkeyAuthentication",
        "8.0",
        KeywordVerdict.REFUSED,
        "moectl logs in by key only",
        f"{_YES}|unbound|host-bound",
        "set 'PubkeyAuthentication yes' for this host",
    ),
    Keyword(
        "PreferredAuthentications",
        "8.0",
        KeywordVerdict.REFUSED,
        "moectl logs in by key only",
        "(.*,)?publickey(,.*)?",
        "add publickey to PreferredAuthentications",
    ),
    Keyword(
        "RemoteCommand",
        "8.0",
        KeywordVerdict.REFUSED,
        "ssh runs no other command on such a host, and moectl has to",
        "none",
        "set 'RemoteCommand none' for this host, or give it an alias of its own for moectl",
    ),
    Keyword(
        "SessionType",
        "8.7",
        KeywordVerdict.REFUSED,
        "moectl has to run commands on the host",
        "default",
        "set 'SessionType default' for this host",
    ),
    # Named in the error when the login fails.
    Keyword("ControlPath", "8.0", KeywordVerdict.LOGIN, "moectl does not use connections that ssh holds open", "none"),
    Keyword("GSSAPIAuthentication", "8.0", KeywordVerdict.LOGIN, "moectl uses no Kerberos tickets", _NO),
    Keyword("HostbasedAuthentication", "8.0", KeywordVerdict.LOGIN, "moectl does not log in as a host", _NO),
    Keyword(
        "PKCS11Provider", "8.0", KeywordVerdict.LOGIN, "moectl uses its keys from an agent only (ssh-add -s)", "none"
    ),
    Keyword(
        "SecurityKeyProvider", "8.2", KeywordVerdict.LOGIN, "moectl uses security keys from an agent only", "internal"
    ),
    Keyword("UseKeychain", "8.0", KeywordVerdict.LOGIN, "moectl takes no passphrase from the keychain (ssh-add)", _NO),
    # Named in the error when a host key is refused.
    Keyword("GSSAPIKeyExchange", "8.0", KeywordVerdict.TRUST, "a ticket vouches for no host key", _NO),
    Keyword("NoHostAuthenticationForLocalhost", "8.0", KeywordVerdict.TRUST, "localhost needs a known key too", _NO),
    Keyword("StrictHostKeyChecking", "8.0", KeywordVerdict.TRUST, "no key is accepted unseen", f"ask|{_YES}"),
    Keyword("VerifyHostKeyDNS", "8.0", KeywordVerdict.TRUST, "the DNS vouches for no host key", _NO),
)

TABLE: Mapping[str, Keyword] = {row.name.lower(): row for row in KEYWORDS}


def find_set(verdict: KeywordVerdict, values: Mapping[str, str]) -> Iterator[tuple[Keyword, str]]:
    """Yield the keywords of a verdict whose value changes something."""
    for row in KEYWORDS:
        value = values.get(row.name.lower())
        if row.verdict is verdict and value is not None and not re.fullmatch(row.unset, value):
            yield row, value
