"""A survey of a host: one script that asks for all that `doctor` needs, and the parts of its answer.

The script is the one about hardware with more sections. The section of a missing tool is empty. `cluster.doctor` says
what the parts mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from moectl.errors import CommandFailed
from moectl.hosts.connect import map_at_once
from moectl.hosts.hardware import MARK, Hardware, parse_probe, split_sections
from moectl.hosts.macos import Version, parse_version
from moectl.hosts.remote import Remote
from moectl.hosts.thunderbolt import Port, parse_ifconfig, parse_ports

_R = TypeVar("_R")
HARDWARE_S = 20.0
# Both systems' own tools, in one run.
HARDWARE_SCRIPT = f"""
export LC_ALL=C PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin"
say() {{ printf '\\n{MARK}%s\\n' "$1"; }}
say system; uname -s
if [ "$(uname -s)" = Darwin ]; then
  say sysctl; sysctl hw.memsize hw.ncpu machdep.cpu.brand_string iogpu.wired_limit_mb
  say vm_stat; vm_stat
  say sw_vers; sw_vers
  say system_profiler; system_profiler -json SPHardwareDataType SPDisplaysDataType SPThunderboltDataType
else
  say meminfo; cat /proc/meminfo
  say cpuinfo; cat /proc/cpuinfo
  say os-release; cat /etc/os-release
  say nvidia-smi; timeout 5 nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader,nounits
fi
exit 0
"""
SURVEY_S = 30.0
_BEFORE = """
printf '\\nmoectl-probe locale\\n'; locale 2>&1 >/dev/null
"""
_MORE = """
say workers; ps -axo rss=,args= | grep '[m]oectl worker'
say sshd; (sshd -T || cat /etc/ssh/sshd_config.d/*.conf /etc/ssh/sshd_config) 2>/dev/null \\
  | grep -iE '^[[:space:]]*max(sessions|startups)'
if [ "$(uname -s)" = Darwin ]; then
  say machine; uname -m
  say pmset; pmset -g
  say pmset_custom; pmset -g custom
  say firewall; fw=/usr/libexec/ApplicationFirewall/socketfilterfw
  "$fw" --getglobalstate; "$fw" --getblockall
  say networksetup; networksetup -listallhardwareports
  say ifconfig; ifconfig
  say rdma_ctl; rdma_ctl status 2>&1
  say ibv_devices; ibv_devices
  say ibv_devinfo; ibv_devinfo
else
  say ip; ip -o -4 addr show
fi
exit 0
"""
SCRIPT = _BEFORE + HARDWARE_SCRIPT.removesuffix("exit 0\n") + _MORE


@dataclass(frozen=True, slots=True)
class Survey:
    """What a host says about itself."""

    hardware: Hardware
    sections: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_mac(self) -> bool:
        return self.hardware.os == "macOS"

    @property
    def macos_version(self) -> Version | None:
        """Return macOS's version, (26, 2)."""
        return parse_version(self.hardware.os_version) if self.is_mac else None

    @property
    def build(self) -> str | None:
        """Return macOS's build, "25C56"."""
        match = re.search(r"^BuildVersion:\s*(\S+)", self.sections.get("sw_vers", ""), re.MULTILINE)
        return match[1] if match else None

    @property
    def ports(self) -> tuple[Port, ...]:
        """Return its Thunderbolt ports."""
        names = ("system_profiler", "networksetup", "ibv_devices")
        return parse_ports(*(self.sections.get(name, "") for name in names))

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return its IPv4 addresses; none where they are not known."""
        if self.is_mac:
            interfaces = parse_ifconfig(self.sections.get("ifconfig", ""))
            return tuple(str(address.ip) for interface in interfaces for address in interface.ipv4)
        return parse_ip(self.sections.get("ip", ""))

    @property
    def has_workers(self) -> bool:
        """Return whether a worker runs there."""
        return bool(self.sections.get("workers", "").strip())

    @property
    def workers_bytes(self) -> int:
        """Return the memory of the workers that run there: it is a part of the memory in use."""
        kib = (line.split()[0] for line in self.sections.get("workers", "").split("\n") if line.split())
        return sum(int(word) << 10 for word in kib if re.fullmatch(r"[0-9]{1,12}", word))


def survey_host(remote: Remote) -> Survey:
    """Ask a host, in one command; needs no python there. Raises HostError, CommandFailed."""
    return _ask(remote, SCRIPT, SURVEY_S, read_survey)


def read_survey(text: str) -> Survey:
    """Return the survey from the output of the script. Raises CommandFailed for an unknown system."""
    return Survey(parse_probe(text), split_sections(text))


def parse_ip(text: str) -> tuple[str, ...]:
    """Return the addresses of Linux's `ip -o -4 addr show`."""
    # "/24" follows an address, " peer …" that of a tunnel's end.
    return tuple(re.findall(r"\binet (\d{1,3}(?:\.\d{1,3}){3})[/ ]", text))


def parse_sshd(text: str) -> dict[str, str]:
    """Return sshd's limits by their name in small letters; the first line of an option counts."""
    limits: dict[str, str] = {}
    for line in text.split("\n"):
        words = line.split()
        if len(words) >= 2:
            limits.setdefault(words[0].lower(), words[1])
    return limits


def read_hardware(remote: Remote) -> Hardware:
    """Return a host's hardware, in one command; needs no python there. Raises HostError, CommandFailed."""
    return _ask(remote, HARDWARE_SCRIPT, HARDWARE_S, parse_probe)


def _ask(remote: Remote, script: str, limit_s: float, read: Callable[[str], _R]) -> _R:
    done = remote.run(["sh", "-c", script], timeout_s=limit_s)
    try:
        return read(done.stdout.decode("utf-8", "replace"))
    except CommandFailed as error:
        raise CommandFailed(error.message, host=remote.name) from None


def read_all_hardware(remotes: Sequence[Remote]) -> tuple[Hardware, ...]:
    """Return the hardware of all hosts, asked at once. Raises the first host's error."""
    return tuple(map_at_once(read_hardware, remotes))
