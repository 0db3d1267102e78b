"""Macs for tests: what their tools print for a given cabling, and hosts behind the test sshd that have these tools.

Such a host is this machine with small scripts in the place of macOS's tools first in its PATH; they keep the Mac's
state in files. A key of its own, whose authorized_keys line sets that PATH, leads to it; sshd and the shell are real.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from moectl.cluster.setup.machine import Machine, read_machine
from moectl.hosts.hostfile import Host
from moectl.hosts.survey import read_survey
from tests.support.cabling import End, hardware_ports_text, ibv_devices_text, profiler_json
from tests.support.mlx_config import Recorded
from tests.support.sshd import Server, make_key

PORTS = {1: "en2", 2: "en3", 3: "en4", 4: "en5"}  # receptacle → interface
# What follows runs in the Mac's directory. sudo logs what it is to run but for `true`, and obeys the files beside it.
SUDO = r"""
refuse() { echo "$1" >&2; exit 1; }
if [ "$1" = -n ]; then
  shift; [ ! -s password ] || refuse "sudo: a password is required"
else
  shift 3; read -r typed; [ "$typed" = "$(cat password)" ] || refuse "sudo: 1 incorrect password attempt"
fi
[ "$*" != true ] || exit 0
echo "$*" >>sudo.log
read -r fails <fails; read -r cut_at <cut_at; read -r listener <listener
case "$*" in *"${fails:-nothing}"*) refuse "$1: ioctl (SIOCAIFADDR): Operation not permitted";; esac
case "$*" in *"${cut_at:-nothing}"*)  # the command runs, and nobody hears of its end
  parent=$$
  while session=$parent; parent=$(ps -o ppid= -p "$session" | tr -d ' '); [ "${parent:-0}" -gt 1 ]; do
    [ "$parent" != "$listener" ] || { kill -9 "$session"; break; }
  done;;
esac
exec "$@"
"""
IFCONFIG = r"""
[ $# -gt 0 ] || exec cat interfaces/*
own=interfaces/$1
edit() { sed "$1" "$own" >new; cat new >"$own"; }
refuse() { echo "ifconfig: $1" >&2; exit 1; }
[ -e "$own" ] || refuse "interface $1 does not exist"
case "$2 $4" in
  "up ") edit '1s/<UP,/</; 1s/</<UP,/';;
  "down ") edit 's/<UP,/</';;
  "inet netmask")
    edit '/^[[:space:]]*inet /d'
    printf '\tinet %s netmask 0x%02x%02x%02x%02x\n' "$3" $(echo "$5" | tr . ' ') >>"$own";;
  "inet delete")
    grep -q "inet $3 " "$own" || refuse "ioctl (SIOCDIFADDR): Can't assign requested address"
    edit "/^[[:space:]]*inet $3 /d";;
  *) refuse "bad value";;
esac
"""
ROUTE = """
case "$1" in
  change) echo "$4" >"routes/$2";;
  delete) rm "routes/$2" 2>/dev/null || { echo "route: writing to routing socket: not in table" >&2; exit 1; };;
esac
"""
SYSCTL = """
case "$1" in *=*) sed "s/^${1%=*}: .*/${1%=*}: ${1#*=}/" says/sysctl >new; cat new >says/sysctl;; esac
cat says/sysctl
"""
PMSET = """
case "$1" in -c) sed "s/ sleep .*/ $2 $3/" says/pmset >new; cat new >says/pmset;; -g) cat says/pmset;; esac
"""


def ifconfig_text(interfaces: Mapping[str, Mapping[str, Any]]) -> str:
    """Return `ifconfig` of interfaces: {"en3": {"inet": ["10.0.0.1/24"], "members": []}}."""
    return "".join(_interface_text(name, **own) for name, own in interfaces.items())


def _interface_text(name: str, up: bool = True, inet: Sequence[str] = (), members: Sequence[str] = ()) -> str:
    lines = [f"{name}: flags=8863<{'UP,' * up}BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500"]
    lines += ["\toptions=460<TSO4,TSO6,CHANNEL_IO>", "\tstatus: active"]
    lines += [f"\tmember: {member} flags=3<LEARNING,DISCOVER>" for member in members]
    for address in map(IPv4Interface, inet):
        lines.append(f"\tinet {address.ip} netmask 0x{int(address.netmask):08x}")
    return "\n".join([*lines, ""])


def interfaces(mac: int, ports: Mapping[int, str] = PORTS) -> dict[str, dict[str, Any]]:
    """Return a Mac's interfaces as macOS makes them: Ethernet, ports without addresses, all of them in bridge0."""
    return {
        "lo0": {"inet": ["127.0.0.1/8"]},
        "en0": {"inet": [f"10.0.0.{mac + 1}/24"]},
        **{name: {} for name in ports.values()},
        "bridge0": {"inet": ["169.254.205.255/16"], "members": list(ports.values())},
    }


def record(
    mac: int,
    cables: Sequence[tuple[End, End]],
    *,
    ports: Mapping[int, str] = PORTS,
    rdma: bool = True,
    link_gbit: int = 80,
    idle_gbit: int = 120,
) -> Recorded:
    """Return what one Mac's tools print when Macs are cabled so."""
    return Recorded(
        profiler_json(mac, cables, ports=max(ports), link_gbit=link_gbit, idle_gbit=idle_gbit),
        hardware_ports_text(ports),
        ibv_devices_text(list(ports.values()) if rdma else []),
        ifconfig_text(interfaces(mac, ports)),
        f"10.0.0.{mac + 1}",
    )


def read(host: Host, recorded: Recorded, *, version: str = "26.2", sleep: int = 0, **fields: Any) -> Machine:
    """Return the machine that moectl makes of a recording."""
    sections = {
        "system": "Darwin",
        "sysctl": "hw.memsize: 137438953472\niogpu.wired_limit_mb: 0",
        "sw_vers": f"ProductVersion:\t\t{version}\nBuildVersion:\t\t25C56",
        "system_profiler": recorded.system_profiler,
        "networksetup": recorded.hardware_ports,
        "ibv_devices": recorded.ibv_devices,
        "ifconfig": recorded.ifconfig,
        "pmset": f" sleep                {sleep}",
    }
    text = "".join(f"\nmoectl-probe {name}\n{body}\n" for name, body in sections.items())
    return read_machine(host, read_survey(text), **fields)


@dataclass(frozen=True)
class FakeMac:
    """One such host; `host` reaches it."""

    directory: Path
    host: Host

    def says(self, tool: str) -> str:
        """Return what one of its tools prints when asked."""
        return (self.directory / "says" / tool).read_text()

    @property
    def interfaces(self) -> dict[str, str]:
        """Return what ifconfig prints of each interface."""
        return {path.name: path.read_text() for path in sorted((self.directory / "interfaces").iterdir())}

    def change(self, **values: str) -> None:
        """Say which command `fails`, at which the connection is cut (`cut_at`), or sudo's `password`."""
        for name, value in values.items():
            (self.directory / name).write_text(f"{value}\n" if value else "")

    @property
    def commands(self) -> list[str]:
        """Return what sudo ran or was to run."""
        log = self.directory / "sudo.log"
        return log.read_text().splitlines() if log.exists() else []

    def restart(self, mac: int) -> None:
        """Lose what a restart loses: addresses, routes, the state of the bridge."""
        for name, own in interfaces(mac).items():
            (self.directory / "interfaces" / name).write_text(_interface_text(name, **own))
        for path in (self.directory / "routes").iterdir():
            path.unlink()


def start_mac(sshd: Server, directory: Path, mac: int, recorded: Recorded) -> FakeMac:
    """Make a Mac `mac0`, `mac1` … behind the test's sshd."""
    for name in ("bin", "says", "interfaces", "routes"):
        (directory / name).mkdir(parents=True)
    says = {
        "uname": "Darwin",
        "sw_vers": "ProductName:\t\tmacOS\nProductVersion:\t\t26.2\nBuildVersion:\t\t25C56",
        "system_profiler": recorded.system_profiler,
        "networksetup": recorded.hardware_ports,
        "ibv_devices": recorded.ibv_devices,
        "ibv_devinfo": "",
        "rdma_ctl": "enabled",
        "vm_stat": "",
        "sysctl": "hw.memsize: 137438953472\niogpu.wired_limit_mb: 0",
        "pmset": "System-wide power settings:\nCurrently in use:\n sleep 10",
    }
    scripts = {tool: f"cat says/{tool}\n" for tool in says}
    scripts |= {"sudo": SUDO, "ifconfig": IFCONFIG, "route": ROUTE, "sysctl": SYSCTL, "pmset": PMSET}
    for tool, text in says.items():
        (directory / "says" / tool).write_text(text + "\n")
    tools = directory / "bin"
    for tool, script in scripts.items():
        (tools / tool).write_text(f"#!/bin/sh\ncd {shlex.quote(str(directory))} || exit\n{script}")
        (tools / tool).chmod(0o755)
    found = FakeMac(directory, Host(f"mac{mac}"))
    found.change(fails="", cut_at="", password="", listener=str(sshd.process.pid))
    found.restart(mac)
    _add_login(sshd, found)
    return found


def _add_login(sshd: Server, mac: FakeMac) -> None:
    """Let a key of its own in, and its name into the ssh configuration."""
    tools = mac.directory / "bin"
    key = make_key(mac.directory / "key")
    command = f'PATH={shlex.quote(str(tools))}:$PATH exec sh -c "$SSH_ORIGINAL_COMMAND"'.replace('"', '\\"')
    with (sshd.directory / "authorized_keys").open("a") as f:
        f.write(f'command="{command}" {Path(f"{key}.pub").read_text()}')
    sshd.add_alias(
        mac.host.name,
        "HostName 127.0.0.1",
        f"Port {sshd.port}",
        f"User {sshd.user}",
        f"IdentityFile {key}",
        "IdentitiesOnly yes",
        "IdentityAgent none",
        f"UserKnownHostsFile {sshd.known_hosts}",
        "GlobalKnownHostsFile none",
        base=False,
    )
