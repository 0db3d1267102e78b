"""macOS's own tools, as far as moectl asks or tells them, over a state in a file: a Mac for tests on any system.

Run as `python mac_program.py DIRECTORY TOOL ARGUMENT…`; `tests/fake_mac.py` puts the tools first in a host's PATH. What
they print has the layout of tests/recordings/thunderbolt. sudo and what it runs are logged, one JSON list a line, and
fail where the state says so.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def ifconfig_text(interfaces: Mapping[str, Mapping[str, Any]]) -> str:
    """Return `ifconfig` of interfaces: {"en3": {"up": True, "inet": ["10.0.0.1/24"], "members": []}}."""
    return "".join(_interface(name, **own) for name, own in interfaces.items())


def _interface(name: str, up: bool = True, inet: Sequence[str] = (), members: Sequence[str] = ()) -> str:
    flags = "8863<UP,BROADCAST,SMART,RUNNING" if up else "8822<BROADCAST,SMART"
    lines = [f"{name}: flags={flags},SIMPLEX,MULTICAST> mtu 1500", "\toptions=460<TSO4,TSO6,CHANNEL_IO>"]
    lines += [f"\tmember: {member} flags=3<LEARNING,DISCOVER>" for member in members]
    for text in inet:
        address = ipaddress.IPv4Interface(text)
        mask = f"0x{int(address.netmask):08x}"
        lines.append(f"\tinet {address.ip} netmask {mask} broadcast {address.network.broadcast_address}")
    return "\n".join([*lines, f"\tstatus: {'active' if up else 'inactive'}", ""])


def main(directory: Path, tool: str, *words: str) -> int:
    """Be one tool; return its exit code."""
    state = json.loads((directory / "state.json").read_text())
    code = _tools(directory)[tool](state, words)
    if tool != "sudo":  # what it ran has written the state
        (directory / "state.json").write_text(json.dumps(state, indent=1))
    return code


def _tools(directory: Path) -> dict[str, Callable[[dict[str, Any], Sequence[str]], int]]:
    return {
        "sudo": lambda state, words: _sudo(directory, state, words),
        "ifconfig": _ifconfig,
        "route": _route,
        "sysctl": _sysctl,
        "pmset": _pmset,
        "uname": lambda state, words: _say("Darwin"),
        "sw_vers": lambda state, words: _say(
            f"ProductName:\t\tmacOS\nProductVersion:\t\t{state['version']}\nBuildVersion:\t\t25C56"
        ),
        "system_profiler": lambda state, words: _say(state["system_profiler"]),
        "networksetup": lambda state, words: _say(state["hardware_ports"]),
        "ibv_devices": lambda state, words: _say(state["ibv_devices"]),
        "ibv_devinfo": lambda state, words: 0,
        "rdma_ctl": lambda state, words: _say("enabled" if "rdma_" in state["ibv_devices"] else "disabled"),
        "vm_stat": lambda state, words: 0,
    }


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    return 0


def _complain(text: str) -> int:
    sys.stderr.write(f"{text}\n")
    return 1


def _sudo(directory: Path, state: dict[str, Any], words: Sequence[str]) -> int:
    flags, command = ["-n"], list(words[1:])
    if words[:3] == ("-S", "-p", ""):
        flags, command = ["-S"], list(words[3:])
    password = state["password"]
    if password is not None and (flags == ["-n"] or sys.stdin.readline().rstrip("\n") != password):
        return _complain("sudo: a password is required" if flags == ["-n"] else "sudo: 1 incorrect password attempt")
    with (directory / "sudo.log").open("a") as f:
        f.write(json.dumps(command) + "\n")
    if state["fails"] and state["fails"] in " ".join(command):
        return _complain(f"{command[0]}: ioctl (SIOCAIFADDR): Operation not permitted")
    return subprocess.run(command, check=False).returncode


def _ifconfig(state: dict[str, Any], words: Sequence[str]) -> int:
    interfaces = state["interfaces"]
    if not words:
        return _say(ifconfig_text(interfaces))
    own = interfaces.get(words[0])
    match words[1:]:
        case _ if own is None:
            return _complain(f"ifconfig: interface {words[0]} does not exist")
        case ["up" | "down" as word]:
            own["up"] = word == "up"
        case ["inet", address, "netmask", mask]:
            own["inet"] = [f"{address}/{ipaddress.IPv4Address(mask)}", *own.get("inet", [])[1:]]
        case ["inet", address, "delete"]:
            kept = [one for one in own.get("inet", []) if one.split("/")[0] != address]
            if len(kept) == len(own.get("inet", [])):
                return _complain("ifconfig: ioctl (SIOCDIFADDR): Can't assign requested address")
            own["inet"] = kept
        case _:
            return _complain("ifconfig: bad value")
    return 0


def _route(state: dict[str, Any], words: Sequence[str]) -> int:
    match words:
        case ["change", peer, "-interface", interface]:
            state["routes"][peer] = interface
        case ["delete", peer]:
            if state["routes"].pop(peer, None) is None:
                return _complain("route: writing to routing socket: not in table")
        case _:
            return _complain("usage: route [-dnqtv] command [[modifiers] args]")
    return 0


def _sysctl(state: dict[str, Any], words: Sequence[str]) -> int:
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            state["sysctl"][name] = value
        _say(f"{name}: {state['sysctl'].get(name, '')}")
    return 0


def _pmset(state: dict[str, Any], words: Sequence[str]) -> int:
    if tuple(words) == ("-g",):
        return _say(f"System-wide power settings:\nCurrently in use:\n sleep                {state['sleep']}")
    if tuple(words[:2]) == ("-c", "sleep"):
        state["sleep"] = int(words[2])
        return 0
    return _complain("usage: pmset")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
