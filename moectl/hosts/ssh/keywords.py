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
    verdict: KeywordVerdict
    words: str  # how it is honoured, why it is harmless, or what an error says of it
    unset: str = ""  # regular expression of the values that change nothing; for the last three verdicts
    hint: str = ""  # for REFUSED


def _rows(verdict: KeywordVerdict, text: str) -> list[Keyword]:
    """Read `name words`, one keyword a line."""
    found = (line.split(None, 1) for line in text.strip().splitlines())
    return [Keyword(name, verdict, words) for name, words in found]


_NO = "no|false"
_YES = "yes|true"

KEYWORDS: tuple[Keyword, ...] = (
    *_rows(
        KeywordVerdict.HONOURED,
        """
        Host                         the name as typed
        User                         the login name
        Hostname                     where to connect
        Port                         where to connect
        AddressFamily                which addresses of the name are tried
        BindAddress                  the address to connect from
        ConnectTimeout               for one attempt; 10 s where it is not set
        ConnectionAttempts           as many attempts, a second apart
        CanonicalizeHostname         ssh -G did it
        CanonicalizeFallbackLocal    ssh -G did it
        CanonicalizeMaxDots          ssh -G did it
        CanonicalizePermittedCNAMEs  ssh -G did it
        CanonicalDomains             ssh -G did it
        IgnoreUnknown                ssh -G did it
        Tag                          ssh -G did it (Match tagged)
        ProxyJump                    hop by hop, with its tokens
        ProxyCommand                 run by $SHELL, with its tokens
        IdentityFile                 private keys and public keys of an agent, with tokens
        CertificateFile              offered with its key, from a file or an agent
        IdentitiesOnly               other keys of an agent are not offered
        IdentityAgent                none, SSH_AUTH_SOCK, $VARIABLE, a path
        PubkeyAcceptedAlgorithms     other keys are not offered
        PubkeyAcceptedKeyTypes       the name of PubkeyAcceptedAlgorithms until 8.4
        RequiredRSASize              for keys of both sides
        Ciphers                      those of them that paramiko has, AES-GCM first
        MACs                         those of them that paramiko has
        KexAlgorithms                those of them that paramiko has
        HostKeyAlgorithms            those of them that paramiko has, known ones first
        CASignatureAlgorithms        for certificates of hosts
        UserKnownHostsFile           all files, with @cert-authority, @revoked and hashed names
        GlobalKnownHostsFile         all files
        HostKeyAlias                 the name that is looked up
        CheckHostIP                  another key known for the address is refused
        RevokedHostKeys              lists of keys and KRLs, all files
        KnownHostsCommand            run, with its tokens
        SetEnv                       sent for each command
        SendEnv                      sent for each command, except the language of this terminal (LANG, LC_*)
        """,
    ),
    *_rows(
        KeywordVerdict.HARMLESS,
        """
        AddKeysToAgent                   moectl unlocks no key
        BatchMode                        moectl never asks
        ChallengeResponseAuthentication  moectl gives no passwords
        ChannelTimeout                   moectl's own heartbeats keep its channels busy
        ClearAllForwardings              moectl forwards nothing
        Compression                      the bytes are the same
        ControlMaster                    moectl's connections are its own
        ControlPersist                   moectl's connections are its own
        DynamicForward                   moectl forwards nothing
        EnableEscapeCommandline          for a terminal
        EnableSSHKeysign                 a setting of ssh-keysign
        EscapeChar                       for a terminal
        ExitOnForwardFailure             moectl forwards nothing
        FingerprintHash                  moectl shows SHA256
        ForkAfterAuthentication          moectl waits for its commands
        ForwardAgent                     moectl forwards no agent
        ForwardX11                       moectl forwards nothing
        ForwardX11Timeout                moectl forwards nothing
        ForwardX11Trusted                moectl forwards nothing
        GatewayPorts                     moectl forwards nothing
        GSSAPIClientIdentity             see GSSAPIAuthentication
        GSSAPIDelegateCredentials        see GSSAPIAuthentication
        GSSAPIKexAlgorithms              see GSSAPIKeyExchange
        GSSAPIRenewalForcesRekey         see GSSAPIKeyExchange
        GSSAPIServerIdentity             see GSSAPIAuthentication
        GSSAPITrustDns                   see GSSAPIAuthentication
        HashKnownHosts                   moectl writes no known_hosts
        HostbasedAcceptedAlgorithms      see HostbasedAuthentication
        HostbasedKeyTypes                see HostbasedAuthentication
        IPQoS                            marks of packets
        KbdInteractiveAuthentication     moectl gives no passwords
        KbdInteractiveDevices            moectl gives no passwords
        LocalCommand                     moectl runs nothing here once it is connected
        LocalForward                     moectl forwards nothing
        LogLevel                         ssh's own messages
        LogVerbose                       ssh's own messages
        NumberOfPasswordPrompts          moectl gives no passwords
        ObscureKeystrokeTiming           for a terminal
        PasswordAuthentication           moectl gives no passwords
        PermitLocalCommand               moectl runs nothing here once it is connected
        PermitRemoteOpen                 moectl forwards nothing
        RekeyLimit                       paramiko changes its keys every 512 MB
        RemoteForward                    moectl forwards nothing
        RequestTTY                       moectl needs no terminal there
        ServerAliveCountMax              moectl has its own signs of life
        ServerAliveInterval              moectl has its own signs of life
        StdinNull                        moectl's commands have their own stdin
        StreamLocalBindMask              moectl forwards nothing
        StreamLocalBindUnlink            moectl forwards nothing
        SyslogFacility                   ssh's own messages
        TCPKeepAlive                     moectl has its own signs of life
        Tunnel                           moectl forwards nothing
        TunnelDevice                     moectl forwards nothing
        UpdateHostKeys                   moectl writes no known_hosts
        VersionAddendum                  a word in ssh's greeting
        VisualHostKey                    ssh's own messages
        WarnWeakCrypto                   ssh's own messages
        XAuthLocation                    moectl forwards nothing
        """,
    ),
    # Refused: here ssh would behave differently from moectl.
    Keyword(
        "BindInterface",
        KeywordVerdict.REFUSED,
        "moectl cannot choose an interface by its name",
        "none",
        "set BindAddress to the address of that interface instead",
    ),
    Keyword(
        "ProxyUseFdpass",
        KeywordVerdict.REFUSED,
        "moectl talks to a ProxyCommand over its stdin and stdout",
        _NO,
        "set 'ProxyUseFdpass no', and take a ProxyCommand that relays (nc without -F)",
    ),
    Keyword(
        "PubkeyAuthentication",
        KeywordVerdict.REFUSED,
        "moectl logs in by key only",
        f"{_YES}|unbound|host-bound",
        "set 'PubkeyAuthentication yes' for this host",
    ),
    Keyword(
        "PreferredAuthentications",
        KeywordVerdict.REFUSED,
        "moectl logs in by key only",
        "(.*,)?publickey(,.*)?",
        "add publickey to PreferredAuthentications",
    ),
    Keyword(
        "RemoteCommand",
        KeywordVerdict.REFUSED,
        "ssh runs no other command on such a host, and moectl has to",
        "none",
        "set 'RemoteCommand none' for this host, or give it an alias of its own for moectl",
    ),
    Keyword(
        "SessionType",
        KeywordVerdict.REFUSED,
        "moectl has to run commands on the host",
        "default",
        "set 'SessionType default' for this host",
    ),
    # Named in the error when the login fails.
    Keyword("ControlPath", KeywordVerdict.LOGIN, "moectl does not use connections that ssh holds open", "none"),
    Keyword("GSSAPIAuthentication", KeywordVerdict.LOGIN, "moectl uses no Kerberos tickets", _NO),
    Keyword("HostbasedAuthentication", KeywordVerdict.LOGIN, "moectl does not log in as a host", _NO),
    Keyword("PKCS11Provider", KeywordVerdict.LOGIN, "moectl uses its keys from an agent only (ssh-add -s)", "none"),
    Keyword("SecurityKeyProvider", KeywordVerdict.LOGIN, "moectl uses security keys from an agent only", "internal"),
    Keyword("UseKeychain", KeywordVerdict.LOGIN, "moectl takes no passphrase from the keychain (ssh-add)", _NO),
    # Named in the error when a host key is refused.
    Keyword("GSSAPIKeyExchange", KeywordVerdict.TRUST, "a ticket vouches for no host key", _NO),
    Keyword("NoHostAuthenticationForLocalhost", KeywordVerdict.TRUST, "localhost needs a known key too", _NO),
    Keyword("StrictHostKeyChecking", KeywordVerdict.TRUST, "no key is accepted unseen", f"ask|{_YES}"),
    Keyword("VerifyHostKeyDNS", KeywordVerdict.TRUST, "the DNS vouches for no host key", _NO),
)

TABLE: Mapping[str, Keyword] = {row.name.lower(): row for row in KEYWORDS}


def find_set(verdict: KeywordVerdict, values: Mapping[str, str]) -> Iterator[tuple[Keyword, str]]:
    """Yield the keywords of a verdict whose value changes something."""
    for row in KEYWORDS:
        value = values.get(row.name.lower())
        if row.verdict is verdict and value is not None and not re.fullmatch(row.unset, value):
            yield row, value
