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
    """Read `words: name name …`; further lines of names are indented more."""
    found = re.findall(r"^ {8}(\S.*): (.*(?:\n {12}.*)*)", text, re.MULTILINE)
    return [Keyword(name, verdict, words) for words, names in found for name in names.split()]


_NO = "no|false"
_YES = "yes|true"

KEYWORDS: tuple[Keyword, ...] = (
    *_rows(
        KeywordVerdict.HONOURED,
        """
        the name as typed: Host
        the login name: User
        where to connect: Hostname Port
        which addresses of the name are tried: AddressFamily
        the address to connect from: BindAddress
        for one attempt; 10 s where it is not set: ConnectTimeout
        tried as many times, a second apart: ConnectionAttempts
        ssh -G did it: CanonicalizeHostname CanonicalizeFallbackLocal CanonicalizeMaxDots
            CanonicalizePermittedCNAMEs CanonicalDomains IgnoreUnknown
        ssh -G did it (Match tagged): Tag
        hop by hop, with its tokens: ProxyJump
        run by $SHELL, with its tokens: ProxyCommand
        private keys and public keys of an agent, with tokens: IdentityFile
        offered with its key, from a file or an agent: CertificateFile
        other keys of an agent are not offered: IdentitiesOnly
        none, SSH_AUTH_SOCK, $VARIABLE, a path: IdentityAgent
        other keys are not offered: PubkeyAcceptedAlgorithms
        the name of PubkeyAcceptedAlgorithms until 8.4: PubkeyAcceptedKeyTypes
        for keys of both sides: RequiredRSASize
        those of them that paramiko has, AES-GCM first: Ciphers
        those of them that paramiko has: MACs KexAlgorithms
        those of them that paramiko has, known ones first: HostKeyAlgorithms
        for certificates of hosts: CASignatureAlgorithms
        all files, with @cert-authority, @revoked and hashed names: UserKnownHostsFile
        all files: GlobalKnownHostsFile
        the name that is looked up: HostKeyAlias
        another key known for the address is refused: CheckHostIP
        lists of keys and KRLs, all files: RevokedHostKeys
        run, with its tokens: KnownHostsCommand
        sent for each command: SetEnv
        sent for each command, except the language of this terminal (LANG, LC_*): SendEnv
        """,
    ),
    *_rows(
        KeywordVerdict.HARMLESS,
        """
        moectl unlocks no key: AddKeysToAgent
        moectl never asks: BatchMode
        moectl gives no passwords: ChallengeResponseAuthentication KbdInteractiveAuthentication
            KbdInteractiveDevices NumberOfPasswordPrompts PasswordAuthentication
        moectl's own heartbeats keep its channels busy: ChannelTimeout
        moectl forwards nothing: ClearAllForwardings DynamicForward ExitOnForwardFailure ForwardX11
            ForwardX11Timeout ForwardX11Trusted GatewayPorts LocalForward PermitRemoteOpen RemoteForward
            StreamLocalBindMask StreamLocalBindUnlink Tunnel TunnelDevice XAuthLocation
        the bytes are the same: Compression
        moectl's connections are its own: ControlMaster ControlPersist
        for a terminal: EnableEscapeCommandline EscapeChar ObscureKeystrokeTiming
        a setting of ssh-keysign: EnableSSHKeysign
        moectl shows SHA256: FingerprintHash
        moectl waits for its commands: ForkAfterAuthentication
        moectl forwards no agent: ForwardAgent
        see GSSAPIAuthentication: GSSAPIClientIdentity GSSAPIDelegateCredentials GSSAPIServerIdentity
            GSSAPITrustDns
        see GSSAPIKeyExchange: GSSAPIKexAlgorithms GSSAPIRenewalForcesRekey
        moectl writes no known_hosts: HashKnownHosts UpdateHostKeys
        see HostbasedAuthentication: HostbasedAcceptedAlgorithms HostbasedKeyTypes
        marks of packets: IPQoS
        moectl runs nothing here once it is connected: LocalCommand PermitLocalCommand
        ssh's own messages: LogLevel LogVerbose SyslogFacility VisualHostKey WarnWeakCrypto
        paramiko changes its keys every 512 MB: RekeyLimit
        moectl needs no terminal there: RequestTTY
        moectl sends its own keepalives: ServerAliveCountMax ServerAliveInterval TCPKeepAlive
        moectl's commands have their own stdin: StdinNull
        a word in ssh's greeting: VersionAddendum
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
    Keyword("UseKeychain", KeywordVerdict.LOGIN, "moectl asks no keychain (ssh-add --apple-use-keychain)", _NO),
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
