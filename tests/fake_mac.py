"""Macs for tests: what their tools print for a given cabling, and hosts behind the test sshd that have these tools.

Such a host is this machine with `mac_program`'s tools first in its PATH, reached by a key of its own whose
authorized_keys line sets that PATH; sshd, ssh and the shell are real.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.hosts import Host
from moectl.setup_machine import Machine, read_machine
from moectl.survey import read_survey
from tests.cabling import End, hardware_ports_text, ibv_devices_text, profiler_json
from tests.mac_program import ifconfig_text
from tests.mlx_config import Recorded
from tests.sshd import Server, make_key

PROGRAM = Path(__file__).with_name("mac_program.py")
TOOLS = "sudo ifconfig route sysctl pmset uname sw_vers system_profiler networksetup ibv_devices ibv_devinfo rdma_ctl"
PORTS = {1: "en2", 2: "en3", 3: "en4", 4: "en5"}  # receptacle → interface


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

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "state.json").read_text()))

    def change(self, **values: Any) -> None:
        """Change what the state says: `fails`, `password`, `interfaces` …"""
        (self.directory / "state.json").write_text(json.dumps(self.state | values))

    @property
    def commands(self) -> list[str]:
        """Return what sudo ran, or refused to, but for `true`."""
        log = self.directory / "sudo.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [text for line in lines if (text := " ".join(json.loads(line))) != "true"]

    def restart(self, mac: int) -> None:
        """Lose what a restart loses: addresses, routes, the state of the bridge."""
        self.change(interfaces=interfaces(mac), routes={})


def start_mac(sshd: Server, directory: Path, mac: int, recorded: Recorded) -> FakeMac:
    """Make a Mac `mac0`, `mac1` … behind the test's sshd."""
    tools = directory / "bin"
    tools.mkdir(parents=True)
    for tool in TOOLS.split():
        words = shlex.join([sys.executable, "-I", "-S", str(PROGRAM), str(directory), tool])
        (tools / tool).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (tools / tool).chmod(0o755)
    state = {
        "version": "26.2",
        "system_profiler": recorded.system_profiler,
        "hardware_ports": recorded.hardware_ports,
        "ibv_devices": recorded.ibv_devices,
        "interfaces": interfaces(mac),
        "routes": {},
        "sysctl": {"hw.memsize": "137438953472", "iogpu.wired_limit_mb": "0"},
        "sleep": 10,
        "password": None,
        "fails": "",
    }
    (directory / "state.json").write_text(json.dumps(state))
    key = make_key(directory / "key")
    command = f'PATH={shlex.quote(str(tools))}:$PATH exec sh -c "$SSH_ORIGINAL_COMMAND"'.replace('"', '\\"')
    with (sshd.directory / "authorized_keys").open("a") as f:
        f.write(f'command="{command}" {Path(f"{key}.pub").read_text()}')
    alias = sshd.add_alias(
        f"mac{mac}",
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
    return FakeMac(directory, Host(alias))
