"""What OpenSSH's configuration says about a host (`ssh -G`), with its tokens filled in.

OpenSSH's own program reads it, so Include, Match and system-wide files count as they do for `ssh HOST`. `ssh.keywords`
says what moectl does with each keyword. It reads no key and opens no connection.
"""

from __future__ import annotations

import fnmatch
import os
import pwd
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.errors import HostError
from moectl.hosts.ssh.keywords import TABLE, KeywordVerdict, find_set

TIMEOUT_S = 10.0
SSH_PORT = 22
NO_FILES = ("", "none", "/dev/null")


@dataclass(frozen=True, slots=True)
class SSHSettings:
    """How to reach one host, how to log in there, and which host keys to trust."""

    name: str  # as written in the hosts file or in ProxyJump
    hostname: str
    port: int
    user: str
    identity_files: tuple[Path, ...]
    certificate_files: tuple[Path, ...]
    identities_only: bool
    agent: str | None  # path of the agent's socket
    known_hosts: tuple[Path, ...]
    host_key_name: str  # the name under which known_hosts files the key
    proxy_jump: tuple[str, ...]
    proxy_command: str | None
    connect_timeout_s: float
    environment: Mapping[str, str]  # what SetEnv and SendEnv send
    command: str  # that reaches the host by hand: `ssh -p 2222 ada@mac3`
    values: Mapping[str, str]  # the first value of every keyword, named in lower case
    tokens: Mapping[str, str]  # what %-tokens stand for

    def list_values(self, keyword: str) -> tuple[str, ...]:
        """Return a comma-separated value as words; nothing where this ssh does not print the keyword."""
        return tuple(filter(None, self.values.get(keyword, "").split(",")))


def read_ssh_settings(
    name: str, *, user: str | None = None, port: int | None = None, config: str | None = None
) -> SSHSettings:
    """Return what `ssh -G` says of a host; `config` (or $MOECTL_SSH_CONFIG) replaces ~/.ssh/config.

    Raises HostError when OpenSSH is not installed, refuses its configuration, or has a setting that moectl cannot use.
    """
    config = config or os.environ.get("MOECTL_SSH_CONFIG") or None
    target = ["-F", config] if config else []
    target += ["-p", str(port)] if port else []
    options = [*target, "-l", user] if user else target
    values = _ask_ssh(options, name)
    _refuse(values, name)
    command = shlex.join(["ssh", *target, f"{user}@{name}" if user else name])
    return _read(values, options, name, command)


def run_openssh(argv: Sequence[str], host: str) -> subprocess.CompletedProcess[str]:
    """Run one of OpenSSH's programs without a terminal. Raises HostError when it is missing or does not end."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            errors="replace",
        )
    except FileNotFoundError:
        raise HostError(f"{argv[0]} is not installed here", host=host, hint="install OpenSSH's client") from None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:  # ValueError: a NUL in an argument
        raise HostError(f"{argv[0]} did not answer: {error}", host=host) from None


def _ask_ssh(options: Sequence[str], name: str) -> dict[str, list[str]]:
    done = run_openssh(["ssh", "-G", *options, "--", name], name)
    if done.returncode != 0:
        config = options[options.index("-F") + 1] if "-F" in options else "~/.ssh/config"
        raise _config_error(done.stderr, config, name)
    values: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        values.setdefault(key.lower(), []).append(value)
    return values


def _config_error(said: str, config: str, name: str) -> HostError:
    """Quote the lines that ssh refused: its last line only counts them."""
    lines = [line.strip() for line in said.strip().split("\n") if "terminating," not in line]
    bad = [found for line in lines if (found := re.search(r"line (\d+): Bad configuration option: (\S+)", line))]
    if not bad:
        reason = "; ".join(lines[-2:])
        return HostError(f"ssh refuses its configuration: {reason}", host=name, hint=f"correct {config}")
    more = f" ({len(bad)} such lines)" if len(bad) > 1 else ""
    text = _read_text(config)
    ignored = dict.fromkeys([*_already_ignored(text), *(_as_written(found[2], text) for found in bad)])
    return HostError(
        f"ssh refuses its configuration: {bad[0].string}{more}",
        host=name,
        hint=f"this ssh does not know it: correct it, or put 'IgnoreUnknown {','.join(ignored)}' first in {config}",
    )


def _read_text(path: str) -> str:
    try:
        return Path(_expand_home(path)).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _as_written(keyword: str, text: str) -> str:
    """Return a keyword as the file spells it: ssh prints it in lower case."""
    found = re.search(rf"^\s*({re.escape(keyword)})\b", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else keyword


def _already_ignored(text: str) -> list[str]:
    """Return the keywords that IgnoreUnknown names already: only its first line counts, so a new one names them too."""
    found = re.search(r"^\s*IgnoreUnknown[\s=]+(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found[1].strip('"').split(",") if found else []


def _refuse(values: Mapping[str, Sequence[str]], name: str) -> None:
    """Raise HostError for settings that moectl cannot use, and for unknown keywords that do not have their default."""
    for row, value in find_set(KeywordVerdict.REFUSED, {key: found[0] for key, found in values.items()}):
        raise HostError(f"{row.name} {value} is set for it: {row.words}", host=name, hint=f"{row.hint} (~/.ssh/config)")
    if new := values.keys() - TABLE.keys():
        plain = _ask_ssh(["-F", "none"], name)
        for key in sorted(new):
            if values[key] != plain.get(key):
                raise HostError(
                    f"{key} {values[key][0]} is set for it, a keyword that this moectl does not know",
                    host=name,
                    hint=f"remove {key} for this host (~/.ssh/config), or install a newer moectl",
                )


def _read(values: Mapping[str, list[str]], options: Sequence[str], name: str, command: str) -> SSHSettings:
    one = {key: found[0] for key, found in values.items()}
    hostname, port, user = one.get("hostname", name), int(one.get("port", SSH_PORT)), one["user"]
    tokens = _find_tokens(values, options, name)
    few = {key: tokens[key] for key in "%hnpr"}
    plain = hostname if port == SSH_PORT else f"[{hostname}]:{port}"
    timeout = one.get("connecttimeout", "none")
    proxy = one.get("proxycommand", "none")
    jumps = one.get("proxyjump", "none")

    def paths(keyword: str) -> tuple[Path, ...]:
        written = (text for text in values.get(keyword.lower(), []) if text.lower() != "none")
        return tuple(Path(expand_path(text, tokens, name, keyword)) for text in written)

    return SSHSettings(
        name=name,
        hostname=hostname,
        port=port,
        user=user,
        identity_files=paths("IdentityFile"),
        certificate_files=paths("CertificateFile"),
        identities_only=one.get("identitiesonly") == "yes",
        agent=_find_agent(one.get("identityagent", "SSH_AUTH_SOCK")),
        known_hosts=(*split_paths(one.get("userknownhostsfile")), *split_paths(one.get("globalknownhostsfile"))),
        host_key_name=one.get("hostkeyalias", plain).lower(),
        proxy_jump=() if jumps == "none" else tuple(expand(jumps, few, name, "ProxyJump").split(",")),
        proxy_command=None if proxy == "none" else expand(proxy, few, name, "ProxyCommand"),
        connect_timeout_s=float(timeout) if timeout.isdigit() and int(timeout) else TIMEOUT_S,
        environment=_find_environment(values),
        command=command,
        values=one,
        tokens=tokens,
    )


def _find_tokens(values: Mapping[str, list[str]], options: Sequence[str], name: str) -> dict[str, str]:
    """Return what the %-tokens of ssh_config(5) stand for."""
    one = {key: found[0] for key, found in values.items()}
    hostname, user, account = one.get("hostname", name), one["user"], pwd.getpwuid(os.getuid())
    here = socket.gethostname()
    tokens = {"%": "%", "h": hostname, "n": name, "p": one.get("port", str(SSH_PORT)), "r": user}
    tokens |= {"d": account.pw_dir, "i": str(os.getuid()), "u": account.pw_name, "l": here, "L": here.split(".")[0]}
    tokens["k"] = one.get("hostkeyalias", name)
    jump = one.get("proxyjump", "none").rpartition(",")[2].rpartition("@")[2]
    tokens["j"] = "" if jump == "none" else re.sub(r"(?<=[^:]):\d+$", "", jump).strip("[]")
    used = (values.get(key, []) for key in ("identityfile", "certificatefile", "knownhostscommand", "revokedhostkeys"))
    if any("%C" in text for texts in used for text in texts):
        # Versions of ssh hash different things; ssh -G fills it in for ControlPath.
        tokens["C"] = _ask_ssh([*options, "-o", "ControlPath=%C"], name)["controlpath"][0]
    return tokens


def expand(text: str, tokens: Mapping[str, str], host: str, keyword: str) -> str:
    """Fill in %-tokens. Raises HostError for a token that the keyword does not have, as ssh does."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in tokens:
            raise HostError(
                f"{keyword} {text}: it has no token {found[0]}",
                host=host,
                hint=f"correct {keyword} in ~/.ssh/config; a percent sign itself is written %%",
            )
        return tokens[found[1]]

    return re.sub(r"%(.?)", fill, text)


def expand_path(text: str, tokens: Mapping[str, str], host: str, keyword: str) -> str:
    """Fill in a leading ~, %-tokens and ${VARIABLES}. Raises HostError for an unknown one, as ssh does."""

    def fill(found: re.Match[str]) -> str:
        value = os.environ.get(found[1])
        if value is None:
            hint = f"set it, or correct {keyword} in ~/.ssh/config"
            raise HostError(f"{keyword} {text}: ${{{found[1]}}} is not set here", host=host, hint=hint)
        return value

    # Both in one pass: tokens in the value of a variable are not filled in.
    parts = re.split(r"(\$\{\w+\})", _expand_home(text))
    return "".join(
        re.sub(r"\$\{(\w+)\}", fill, part) if number % 2 else expand(part, tokens, host, keyword)
        for number, part in enumerate(parts)
    )


def _expand_home(text: str) -> str:
    """Fill in a leading ~ or ~user from the list of accounts: ssh does not read $HOME."""
    if not text.startswith("~"):
        return text
    user, slash, rest = text[1:].partition("/")
    try:
        home = (pwd.getpwnam(user) if user else pwd.getpwuid(os.getuid())).pw_dir
    except KeyError:
        return text
    return f"{home}{slash}{rest}"


def split_paths(text: str | None) -> Iterator[Path]:
    """Yield the paths of a value. `ssh -G` omits quotes, so the longest run of words that is a file counts as one."""
    words = (text or "").split(" ")
    while words:
        for count in range(len(words), 0, -1):
            path = _expand_home(" ".join(words[:count]))
            if count == 1 or Path(path).is_file():
                break
        if path not in NO_FILES:
            yield Path(path)
        words = words[count:]


def _find_agent(text: str) -> str | None:
    """Return the agent's socket. `ssh -G` filled in all but the two old forms."""
    if text == "none":
        return None
    if text == "SSH_AUTH_SOCK" or (text.startswith("$") and not text.startswith("${")):
        return os.environ.get(text.removeprefix("$")) or None
    return _expand_home(text)


def _find_environment(values: Mapping[str, list[str]]) -> dict[str, str]:
    """Return what SendEnv and SetEnv send, without the language of this terminal: it is not for other hosts."""
    sent = {
        key: value
        for key, value in os.environ.items()
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in values.get("sendenv", []))
        and not key.startswith(("LANG", "LC_"))
    }
    return sent | {key: value for key, _, value in (text.partition("=") for text in values.get("setenv", []))}
