"""Macs for tests: what their tools print for a given cabling, and hosts behind the test sshd that have these tools.

Such a host is this machine with other tools: a key of its own, whose authorized_keys line runs `login`, leads to it;
sshd and the shell are real. Its tools are scripts that keep the Mac's state in files and take no flag that macOS's own
do not have. Paths of macOS in a command lead into the Mac's directory, and so does its HOME. `macs` describes each Mac,
`mac_python` is its python.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

from moectl.cluster.setup.machine import Machine, read_machine
from moectl.hosts.hostfile import Host
from moectl.hosts.survey import read_survey
from tests.support import mac_python
from tests.support.cabling import End, hardware_ports_text, ibv_devices_text, profiler_json
from tests.support.mac_tools import write_login, write_script, write_tools
from tests.support.macs import DARWIN, MACS, WITH_RDMA, Mac, MacPython, tool_texts
from tests.support.mlx_config import Recorded
from tests.support.sshd import Server, make_key

PORTS = {1: "en2", 2: "en3", 3: "en4", 4: "en5"}  # receptacle → interface
STUDIO = replace(MACS["studio-m4-max"], pythons=(), tools=False)


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
    told = tool_texts(replace(STUDIO, macos=version, sleep_minutes=sleep), recorded)
    sections = {"system": "Darwin", "ifconfig": recorded.ifconfig, **told}
    text = "".join(f"\nmoectl-probe {name}\n{body}\n" for name, body in sections.items())
    return read_machine(host, read_survey(text), **fields)


@dataclass(frozen=True)
class FakeMac:
    """One such host; `host` reaches it."""

    directory: Path
    host: Host
    mac: Mac

    @property
    def home(self) -> Path:
        return self.directory / "Users" / "ada"

    def own(self, text: str) -> str:
        """Return a text with the Mac's paths as they are on a Mac."""
        return text.replace(str(self.directory), "")

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
        return self._log("sudo")

    @property
    def dialogs(self) -> list[str]:
        """Return what opened a dialog on its screen."""
        return self._log("dialogs")

    @property
    def refused(self) -> list[str]:
        """Return the commands whose flags macOS does not have."""
        return self._log("refused")

    @property
    def pip(self) -> list[dict[str, Any]]:
        """Return how pip was called: its words, SYSTEM_VERSION_COMPAT ("compat"), and MLX's wheel for this Mac."""
        return [json.loads(line) for line in self._log("pip")]

    def _log(self, name: str) -> list[str]:
        log = self.directory / f"{name}.log"
        return log.read_text().splitlines() if log.exists() else []

    @contextmanager
    def with_python(self, python: MacPython) -> Iterator[Path]:
        """Let it have this interpreter alone until the block ends; yields its file."""
        install_pythons(self.directory, self.mac, [python])
        names = [inside(self.directory, path) for path in python.paths]
        yield names[0]
        for name in names:
            name.unlink()

    @contextmanager
    def running(self, pid: int, command: str, log: Path | None = None, *, kib: int = 512000) -> Iterator[None]:
        """Let ps show one more process, and the lock beside its log that it runs, until the end."""
        processes = self.directory / "says" / "processes"
        before = processes.read_text()
        processes.write_text(f"{before}{pid} {os.getuid()} {kib} 02:14:07 {command}\n")
        with ExitStack() as ended:
            ended.callback(processes.write_text, before)
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                lock = ended.enter_context(Path(f"{log}.lock").open("w"))
                lock.write(f"{pid}\n")
                lock.flush()
                fcntl.flock(lock, fcntl.LOCK_SH)
                ended.callback(Path(lock.name).unlink)
            yield

    def restart(self, number: int) -> None:
        """Lose what a restart loses: addresses, routes, the state of the bridge."""
        for name, own in interfaces(number, ports_of(self.mac)).items():
            (self.directory / "interfaces" / name).write_text(_interface_text(name, **own))
        for path in (self.directory / "routes").iterdir():
            path.unlink()


def ports_of(mac: Mac) -> dict[int, str]:
    """Return the interfaces of its Thunderbolt ports."""
    return dict(list(PORTS.items())[: mac.ports])


def record_mac(mac: Mac, number: int, cables: Sequence[tuple[End, End]] = ()) -> Recorded:
    """Return what the tools of the `number`th of some Macs print when they are cabled so."""
    link, idle = (80, 120) if mac.thunderbolt == 5 else (40, 40)
    return record(number, cables, ports=ports_of(mac), rdma=mac.rdma, link_gbit=link, idle_gbit=idle)


def start_mac(sshd: Server, directory: Path, number: int, recorded: Recorded, mac: Mac = STUDIO) -> FakeMac:
    """Make a Mac `mac0`, `mac1` … behind the test's sshd."""
    for name in ("usr/bin", "says", "interfaces", "routes", "Users/ada/Documents", "etc/ssh"):
        (directory / name).mkdir(parents=True)
    says = {"processes": "", "darwin": darwin(mac), "firewall": firewall_text(mac), **tool_texts(mac, recorded)}
    for tool, text in says.items():
        (directory / "says" / tool).write_text(text + "\n" if text else "")
    if mac.tools:
        (directory / "tools").touch()
    write_tools(directory, with_rdma=mac.version >= WITH_RDMA)
    install_pythons(directory, mac, mac.all_pythons)
    found = FakeMac(directory, Host(f"mac{number}"), mac)
    found.change(fails="", cut_at="", password="", listener=str(sshd.process.pid))
    found.restart(number)
    _add_login(sshd, found)
    return found


def darwin(mac: Mac) -> str:
    """Return the version of its kernel."""
    return f"{DARWIN[mac.version[0]]}.{mac.version[1]}.0"


def firewall_text(mac: Mac) -> str:
    """Return what socketfilterfw says of its state."""
    return f"Firewall is {'enabled' if mac.firewall else 'disabled'}. (State = {int(mac.firewall)})"


def install_pythons(directory: Path, mac: Mac, pythons: Sequence[MacPython]) -> None:
    """Put interpreters into a Mac's directory, where their installers put them."""
    told = {}
    real = f"{sysconfig.get_config_var('BINDIR')}/python3"
    words = [real, "-S", "-E", "-B", mac_python.__file__, str(directory)]
    for python in pythons:
        file, *links = [inside(directory, path) for path in python.paths]
        write_script(file, f'exec {shlex.join(words)} "$0" "$@"\n')
        for link in links:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file)
        if python.framework:
            write_script(inside(directory, python.runs_as), "exit 1\n")
        told[str(file)] = {
            "version": python.version,
            "machine": python.machine,
            "old_sdk": python.old_sdk,
            "framework": python.framework,
            "macos": mac.macos,
            "darwin": darwin(mac),
            "paths": [*filter(None, sys.path), str(Path(__file__).parents[2])],
        }
    (directory / "pythons.json").write_text(json.dumps(told))


def inside(directory: Path, path: str) -> Path:
    """Return where a path of the Mac's is in its directory."""
    return directory / path.replace("~", "Users/ada", 1).lstrip("/")


def _add_login(sshd: Server, mac: FakeMac) -> None:
    """Let a key of its own in, and its name into the ssh configuration."""
    key, login = make_key(mac.directory / "key"), write_login(mac.directory)
    with (sshd.directory / "authorized_keys").open("a") as f:
        f.write(f'command="{login}" {Path(f"{key}.pub").read_text()}')
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
