"""The list of hosts: hosts.txt, `--hosts a,b`, and what an MLX hostfile says. It opens no connection.

    file   = { [ host *( SP key "=" value ) ] [ "#" comment ] NL }
    host   = [ user "@" ] ( ssh-alias / dns-name / ipv4 / "[" ipv6 "]" ) [ ":" port ]
           / [ user "@" ] ipv6                            ; where its end cannot be a port
    key    = ip | rdma | memory | chip | price | python | dir

'#' starts a comment at line start or after a space. Line order is rank order.
What ssh itself reads (User, Port, IdentityFile, ProxyJump) belongs in ~/.ssh/config.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moectl.errors import HostsError
from moectl.hosts.mlx_rows import read_mlx
from moectl.paths import config_dir
from moectl.text import did_you_mean

KEYS = ("ip", "rdma", "memory", "chip", "price", "python", "dir")

_UNITS: dict[str, int] = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}
_UNITS |= {f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGT")}


_ZONE = re.compile(r"[\w.-]*", re.ASCII)  # of a link-local address; ipaddress would take anything
NAMES_ONLY = "--hosts"  # the source of a list of names without keys


@dataclass(frozen=True, slots=True)
class Host:
    """One host as its owner wrote it; its place in the list is its rank."""

    name: str  # the ssh alias, DNS name or address as written; errors and tables use it
    user: str | None = None
    port: int | None = None
    ips: tuple[str, ...] = ()  # addresses for tensor traffic; empty = resolve the name
    rdma: tuple[str | None, ...] = ()  # RDMA device towards each rank, several joined by '+'; None towards itself
    memory_bytes: int | None = None
    chip: str | None = None
    price: float | None = None
    python: str | None = None
    dir: str | None = None  # root on the host; None = ~/.moectl

    @property
    def is_local(self) -> bool:
        return self.name in ("localhost", "127.0.0.1", "::1") and self.user is None and self.port is None

    @property
    def address(self) -> str:
        """The host as one writes it for ssh: user@name:port, IPv6 in brackets."""
        name = f"[{self.name}]" if ":" in self.name else self.name
        user = f"{self.user}@" if self.user else ""
        return f"{user}{name}" + (f":{self.port}" if self.port else "")


@dataclass(frozen=True, slots=True)
class HostList:
    """Hosts in rank order, with the backend and the variables of an MLX hostfile."""

    hosts: tuple[Host, ...]
    backend: str = ""  # as MLX spells it; empty = not given
    envs: tuple[str, ...] = ()  # NAME=VALUE for every worker
    source: str = ""  # where the list came from, for messages


def find_hosts(hosts: str | None = None, hostfile: str | None = None) -> HostList | None:
    """Return the first host list that is given, None when there is none.

    Order: --hosts, --hostfile (`-` is stdin), $MOECTL_HOSTFILE, ./hosts.txt, hosts.txt in `paths.config_dir`.
    Raises HostsError when that list cannot be read or is wrong.
    """
    if hosts is not None:
        return parse_host_string(hosts)
    named = hostfile if hostfile is not None else os.environ.get("MOECTL_HOSTFILE") or None
    if named is not None:
        return read_hosts(named)
    for path in (Path("hosts.txt"), config_dir() / "hosts.txt"):
        if path.is_file():
            return read_hosts(str(path))
    return None


def read_hosts(path: str) -> HostList:
    """Read a hosts file or an MLX JSON hostfile; `-` reads stdin. Raises HostsError."""
    source = "stdin" if path == "-" else path
    try:
        data = _read_stdin() if path == "-" else Path(path).expanduser().read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise HostsError(f"{source} is not a text file in UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:  # a `~user` without a home, a NUL in a path
        reason = getattr(error, "strerror", None) or str(error)
        raise HostsError(f"cannot read {source}: {reason}", hint="check --hostfile") from None
    return parse_hosts(text, source)


def _read_stdin() -> bytes:
    if sys.stdin is None:  # python started with it closed
        raise ValueError("it is closed")
    return sys.stdin.buffer.read()


def parse_hosts(text: str, source: str = "hosts.txt") -> HostList:
    """Parse a hosts file's text; it is MLX's JSON when it begins with `{`, or with `[` and a JSON value.

    Raises HostsError with `source:line` in front.
    """
    if _looks_like_json(text):
        return _parse_json(text, source)
    hosts: list[Host] = []
    lines: dict[tuple[str, int | None], int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if words:
            where = f"{source}:{number}"
            host = _parse_line(words, where)
            _refuse_duplicate(host, lines, number, where)
            hosts.append(host)
    return _check_list(HostList(tuple(hosts), source=source))


def parse_host_string(text: str) -> HostList:
    """Parse `--hosts a,ada@b:2222,[::1]`: the same grammar without keys. Raises HostsError."""
    seen: dict[tuple[str, int | None], int] = {}
    hosts = []
    for number, word in enumerate(text.split(","), 1):
        if not word.strip():
            raise HostsError("--hosts has an empty name", hint="write --hosts mac1,mac2")
        host = _parse_address(word.strip(), "--hosts")
        _refuse_duplicate(host, seen, number, "--hosts")
        hosts.append(host)
    return HostList(tuple(hosts), source=NAMES_ONLY)


def check_host(host: Host) -> None:
    """Raise HostsError unless a hosts file may hold this host's name, user, port, addresses and paths."""
    again = _parse_address(host.address, "hosts")
    if (again.name, again.user, again.port) != (host.name, host.user, host.port):
        raise HostsError(f"{host.address!r} is not a host")
    for ip in host.ips:
        _check_ip(ip, host.address)
    for key, value in (("python", host.python), ("dir", host.dir)):
        _check_path(key, value, host.address)


def check_envs(envs: Sequence[str], where: str = "hosts") -> None:
    """Raise HostsError unless all are NAME=VALUE, or NAME alone."""
    for env in envs:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=[^\0]*)?", env, re.DOTALL):
            raise HostsError(f"{where}: envs: {env!r} is not NAME=VALUE")


def parse_size(text: str) -> int:
    """Return bytes for `120GB` (10⁹), `64GiB` (2³⁰), `1.5TB` or plain bytes. Raises HostsError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text, re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or len(match[1]) > 24:
        raise HostsError(f"{text!r} is not a size", hint="write for example 120GB (10^9) or 112GiB (2^30)")
    whole, _, fraction = match[1].partition(".")
    size = int(whole) * unit + int(fraction or "0") * unit // int(10 ** len(fraction))
    if size <= 0:
        raise HostsError(f"{text!r} is not a size above zero", hint="write for example 120GB (10^9) or 112GiB (2^30)")
    if not match[2] and size < 1 << 20:
        raise HostsError(f"{text!r} is {size} bytes: no host has so little memory", hint=f"did you mean {text}GB?")
    return size


def format_hosts(hosts: HostList) -> str:
    """Return the list as the text of a hosts file; `parse_hosts` reads the same hosts from it.

    Raises HostsError for what that format cannot hold: variables, and paths with blanks.
    """
    if hosts.envs:
        raise HostsError("a hosts file in text cannot hold envs", hint="write MLX's JSON: a name that ends in .json")
    return "".join(_format_line(host) + "\n" for host in hosts.hosts)


def _format_line(host: Host) -> str:
    words = {
        "ip": ",".join(host.ips),
        "rdma": ",".join(entry or "-" for entry in host.rdma),
        "memory": "" if host.memory_bytes is None else str(host.memory_bytes),
        "chip": host.chip or "",
        "price": "" if host.price is None else repr(host.price),
        "python": host.python or "",
        "dir": host.dir or "",
    }
    for key, value in words.items():
        if re.search(r"\s", value):
            hint = "write MLX's JSON: a name that ends in .json"
            raise HostsError(f"a hosts file in text cannot hold {key} {value!r}", host=host.address, hint=hint)
    return " ".join([host.address, *(f"{key}={value}" for key, value in words.items() if value)])


def split_devices(entry: str | None) -> tuple[str, ...]:
    """Return the RDMA devices of one entry of `Host.rdma`: several where several cables lead to that host."""
    return tuple(entry.split("+")) if entry else ()


def _looks_like_json(text: str) -> bool:
    start = text.lstrip()
    # A host may begin with '[' too, as in '[::1]:22'; in JSON a value, ']' or a blank follows it.
    return start.startswith("{") or bool(re.match(r"\[\s*([{\[\"\]]|$)", start))


def _parse_line(words: Sequence[str], where: str) -> Host:
    host = _parse_address(words[0], where)
    values: dict[str, str] = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals:
            raise HostsError(f"{where}: expected key=value, found {word!r}", hint=f"keys are {', '.join(KEYS)}")
        if key not in KEYS:
            raise HostsError(
                f"{where}: unknown key {key!r}.{did_you_mean(key.lower(), KEYS)}", hint=f"keys are {', '.join(KEYS)}"
            )
        if key in values:
            raise HostsError(f"{where}: {key} is given twice")
        if not value:
            raise HostsError(f"{where}: {key} has no value")
        values[key] = value
    return _apply_keys(host, values, where)


def _apply_keys(host: Host, values: Mapping[str, str], where: str) -> Host:
    rdma: tuple[str | None, ...] = ()
    if "rdma" in values:
        rdma = tuple(None if d in ("", "-", "null") else d for d in values["rdma"].split(","))
        if not all(name for entry in rdma for name in split_devices(entry)):
            raise HostsError(
                f"{where}: rdma has an empty name", hint="write rdma=-,rdma_en2 or rdma=-,rdma_en2+rdma_en3"
            )
    price = _check_price(values["price"], where) if "price" in values else None
    host = replace(host, chip=values.get("chip"), price=price)
    ips = values["ip"].split(",") if "ip" in values else ()
    return _complete(host, {**values, "ips": ips, "rdma": rdma}, where)


def _complete(host: Host, row: Mapping[str, Any], where: str) -> Host:
    """Return a host with what both kinds of file may say about it, checked: ips, rdma, memory, python, dir."""
    memory, python, root = (row.get(key) for key in ("memory", "python", "dir"))
    try:
        size = None if memory is None else parse_size(memory)
    except HostsError as error:
        raise HostsError(f"{where}: memory: {error.message}", hint=error.hint) from None
    for key, value in (("python", python), ("dir", root)):
        _check_path(key, value, where)
    ips = tuple(_check_ip(ip, where) for ip in row["ips"])
    return replace(host, ips=ips, rdma=row["rdma"], memory_bytes=size, python=python, dir=root)


def _check_ip(text: str, where: str) -> str:
    try:
        ipaddress.ip_address(text)
        if not _ZONE.fullmatch(text.partition("%")[2]):
            raise ValueError
    except ValueError:
        raise HostsError(
            f"{where}: {text!r} is not an IP address", hint="write ip=10.0.0.1 or ip=10.0.0.1,10.0.1.1"
        ) from None
    return text


def _check_path(key: str, value: object, where: str) -> None:
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise HostsError(f"{where}: {key} has to be a path")
    if key == "python" and value is not None and value.startswith("-"):  # it would be read as an option
        raise HostsError(f"{where}: {key} may not begin with a dash", hint=f"write {key}=./{value}")


def _check_price(text: str, where: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise HostsError(f"{where}: price {text!r} is not a number", hint="write price=3999")
    return price


def _parse_address(word: str, where: str) -> Host:
    user, at, rest = word.rpartition("@")
    # ssh may hand them to a shell in a ProxyCommand (%h, %n, %r): no character that a shell interprets is allowed.
    if at and not re.fullmatch(r"\w[\w.+-]*", user):
        raise HostsError(f"{where}: {user!r} is not a user name", hint="write user@host")
    address, _, end = rest.rpartition(":")
    is_short = _is_ipv6(address) and bool(re.fullmatch("[0-9]{1,5}", end, re.ASCII))  # it is one without its end too
    if _is_ipv6(rest) and not is_short:
        return Host(rest, user=user or None)
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", rest)
    plain = re.fullmatch(r"(\w[\w.-]*)(?::([^:]*))?", rest)
    match = bracketed or plain
    if match is None or (bracketed and not _is_ipv6(match[1])):
        if is_short:
            whole = f"{user}{at}[{rest}], or " if _is_ipv6(rest) else ""
            what, hint = "may end in a port or not", f"write {whole}{user}{at}[{address}]:{end}"
        else:
            what, hint = "is not a host", "write host, user@host, host:port or [ipv6]:port"
        raise HostsError(f"{where}: {word!r} {what}", hint=hint)
    return Host(match[1], user=user or None, port=_parse_port(match[2], where))


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6 and bool(_ZONE.fullmatch(text.partition("%")[2]))
    except ValueError:
        return False


def _parse_port(text: str | None, where: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,5}", text, re.ASCII) or not 0 < int(text) < 65536:
        raise HostsError(f"{where}: port {text!r} is not between 1 and 65535")
    return int(text)


def _refuse_duplicate(host: Host, seen: dict[tuple[str, int | None], int], number: int, where: str) -> None:
    name = "localhost" if host.is_local else host.name.lower()
    first = seen.setdefault((name, host.port), number)
    if first != number:
        line = "" if where == "--hosts" else f", first on line {first}"
        raise HostsError(f"{where}: {host.name} is listed twice{line}", hint="each host is one rank: list it once")


def _check_list(hosts: HostList) -> HostList:
    """Refuse an empty list and RDMA rows that do not fit the number of hosts."""
    if not hosts.hosts:
        raise HostsError(f"{hosts.source} lists no host", hint="write one host per line")
    for rank, host in enumerate(hosts.hosts):
        if not host.rdma:
            continue
        if len(host.rdma) != len(hosts.hosts):
            raise HostsError(
                f"{hosts.source}: rdma of {host.name} has {len(host.rdma)} entries, there are {len(hosts.hosts)} hosts",
                hint="one entry per rank in list order, '-' for the host itself",
            )
        if host.rdma[rank] is not None:
            raise HostsError(
                f"{hosts.source}: rdma of {host.name} names a device towards itself (entry {rank + 1})",
                hint="write '-' there",
            )
    return hosts


def _parse_json(text: str, source: str) -> HostList:
    backend, envs, rows = read_mlx(text, source)
    check_envs(envs, source)
    seen: dict[tuple[str, int | None], int] = {}
    hosts = []
    for number, row in enumerate(rows):
        where = f"{source}: hosts[{number}]"
        host = _complete(_parse_address(_bracket(row["ssh"]), where), row, where)
        hosts.append(host)
        _refuse_duplicate(host, seen, number + 1, where)
    return _check_list(HostList(tuple(hosts), backend, envs, source))


def _bracket(name: str) -> str:
    """Return an MLX host name as hosts.txt spells it: MLX hands a bare IPv6 address to ssh."""
    user, at, rest = name.rpartition("@")
    return f"{user}{at}[{rest}]" if _is_ipv6(rest) else name
