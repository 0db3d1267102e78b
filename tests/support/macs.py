"""Macs, each by a short description, and what macOS's own tools print on them. Nothing is run here.

tests/recordings/README.md says where the layout of each text comes from; none of the project's own machines is a Mac.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.support.mlx_config import Recorded

BUILDS = {"14.6": "23G80", "15.5": "24F74", "26.1": "25B78", "26.2": "25C56", "26.3": "25D125"}
DARWIN = {14: 23, 15: 24, 26: 25}  # macOS → its kernel
WITH_RDMA = (26, 2)  # the first macOS that has rdma_ctl and ibv_devices
_PAGE = 16384


@dataclass(frozen=True)
class MacPython:
    """An interpreter on a Mac."""

    paths: tuple[str, ...]  # its names; the first is its file, the others lead to it
    version: str = "3.13.9"
    machine: str = "arm64"  # "x86_64": it runs under Rosetta
    old_sdk: bool = False  # built for an older macOS: 26 calls itself 16 for it, unless SYSTEM_VERSION_COMPAT is 0
    framework: str = ""  # the directory of a framework build, whose python starts another file: `runs_as`

    @property
    def runs_as(self) -> str:
        """Return what ps shows."""
        return f"{self.framework}/Resources/Python.app/Contents/MacOS/Python" if self.framework else self.paths[0]


_FRAMEWORK = "/Library/Frameworks/Python.framework/Versions/3.13"
_CELLAR = "/opt/homebrew/Cellar/python@3.13/3.13.9/Frameworks/Python.framework/Versions/3.13"
# /usr/bin/python3 where Apple's Command Line Tools are installed; without them, a program that opens a dialog.
APPLE = MacPython(("/usr/bin/python3",), "3.9.6")
HOMEBREW = MacPython(
    (f"{_CELLAR}/bin/python3.13", "/opt/homebrew/bin/python3", "/opt/homebrew/bin/python3.13"),
    framework=_CELLAR,
)
FRAMEWORK = MacPython(
    (
        f"{_FRAMEWORK}/bin/python3.13",
        f"{_FRAMEWORK}/bin/python3",
        "/usr/local/bin/python3",
        "/usr/local/bin/python3.13",
    ),
    old_sdk=True,
    framework=_FRAMEWORK,
)
UV = MacPython(
    ("~/.local/share/uv/python/cpython-3.13.9-macos-aarch64-none/bin/python3.13", "~/.local/bin/python3.13"),
    old_sdk=True,
)
MACPORTS = MacPython(("/opt/local/bin/python3.13",))
PYENV = MacPython(("~/.pyenv/versions/3.12.12/bin/python3",), "3.12.12", old_sdk=True)
MINIFORGE = MacPython(("~/miniforge3/bin/python3",), "3.12.12", old_sdk=True)
MINIFORGE_OF_HOMEBREW = MacPython(("/opt/homebrew/Caskroom/miniforge/base/bin/python3",), "3.12.12", old_sdk=True)
INTEL = MacPython(
    ("/usr/local/Cellar/python@3.12/3.12.12/bin/python3.12", "/usr/local/bin/python3", "/usr/local/bin/python3.12"),
    "3.12.12",
    "x86_64",
)


@dataclass(frozen=True)
class Mac:
    """One Mac; `memory_gib` and the cores are those of a model that is sold."""

    name: str
    model: str
    chip: str
    memory_gib: int
    cores: int
    gpu_cores: int
    macos: str
    pythons: tuple[MacPython, ...] = ()
    tools: bool = True  # Command Line Tools
    ports: int = 4
    thunderbolt: int = 5
    rdma: bool = False
    sleep_minutes: int = 10
    firewall: bool = False
    wired_limit_mb: int = 0

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.macos.split(".")
        return int(major), int(minor)

    @property
    def all_pythons(self) -> tuple[MacPython, ...]:
        """Return its interpreters, Apple's with the others."""
        return (*self.pythons, *([APPLE] if self.tools else []))


MACS = {
    "mini-m1": Mac("Mac mini", "Macmini9,1", "M1", 16, 8, 8, "14.6", tools=False, ports=2, thunderbolt=4),
    "studio-m2-ultra": Mac("Mac Studio", "Mac14,14", "M2 Ultra", 192, 24, 76, "15.5", (HOMEBREW,), thunderbolt=4),
    "mini-m4-pro": Mac("Mac mini", "Mac16,11", "M4 Pro", 24, 12, 16, "26.1", (HOMEBREW,), ports=3, firewall=True),
    "studio-m4-max": Mac("Mac Studio", "Mac16,9", "M4 Max", 128, 16, 40, "26.2", (UV,), rdma=True),
    "studio-m3-ultra": Mac("Mac Studio", "Mac15,14", "M3 Ultra", 512, 32, 80, "26.3", (FRAMEWORK,), rdma=True),
    "macbook-m5-max": Mac("MacBook Pro", "Mac17,7", "M5 Max", 128, 18, 40, "26.3", (HOMEBREW,), tools=False, ports=3),
    "mini-rosetta": Mac(
        "Mac mini", "Mac16,10", "M4", 32, 10, 10, "26.2", (INTEL,), tools=False, ports=3, thunderbolt=4
    ),
}


def tool_texts(mac: Mac, recorded: Recorded) -> dict[str, str]:
    """Return what each tool of a Mac prints; a tool that its macOS lacks is left out."""
    memory = mac.memory_gib << 30
    texts = {
        "sysctl": "\n".join(
            [
                f"hw.memsize: {memory}",
                f"hw.ncpu: {mac.cores}",
                f"machdep.cpu.brand_string: Apple {mac.chip}",
                f"iogpu.wired_limit_mb: {mac.wired_limit_mb}",
                "iogpu.wired_lwm_mb: 0",
                "sysctl.proc_translated: 0",
            ]
        ),
        "sw_vers": f"ProductName:\t\tmacOS\nProductVersion:\t\t{mac.macos}\nBuildVersion:\t\t{BUILDS[mac.macos]}",
        "vm_stat": vm_stat_text(memory // _PAGE),
        "system_profiler": profile_text(mac, recorded),
        "networksetup": recorded.hardware_ports,
        "pmset": f"System-wide power settings:\nCurrently in use:\n{pmset_text(mac)}",
        "pmset_custom": f"AC Power:\n{pmset_text(mac)}",
    }
    if mac.version >= WITH_RDMA:
        texts |= {
            "rdma_ctl": "enabled" if mac.rdma else "disabled",
            "ibv_devices": recorded.ibv_devices,
            "ibv_devinfo": devinfo_text(recorded) if mac.rdma else "No IB devices found",
        }
    return texts


def profile_text(mac: Mac, recorded: Recorded) -> str:
    """Return `system_profiler -json SPHardwareDataType SPDisplaysDataType SPThunderboltDataType`."""
    display = {
        "_name": f"kHW_Apple{mac.chip.replace(' ', '')}Item",
        "spdisplays_mtlgpufamilysupport": "spdisplays_metal4" if mac.version >= (26, 0) else "spdisplays_metal3",
        "spdisplays_vendor": "sppci_vendor_Apple",
        "sppci_bus": "spdisplays_builtin",
        "sppci_cores": str(mac.gpu_cores),
        "sppci_device_type": "spdisplays_gpu",
        "sppci_model": f"Apple {mac.chip}",
    }
    machine = {
        "_name": "hardware_overview",
        "chip_type": f"Apple {mac.chip}",
        "machine_model": mac.model,
        "machine_name": mac.name,
        "number_processors": f"proc {mac.cores}",
        "physical_memory": f"{mac.memory_gib} GB",
        # What a recording must not have; invented.
        "platform_UUID": "12345678-9ABC-5DEF-8123-456789ABCDEF",
        "serial_number": "H9XK2F7QLC",
    }
    found = {"SPDisplaysDataType": [display], "SPHardwareDataType": [machine], **json.loads(recorded.system_profiler)}
    return json.dumps(found, indent=2)


def vm_stat_text(pages: int) -> str:
    """Return `vm_stat` of a Mac that has just been started: 5 GiB are in use."""
    gib = (1 << 30) // _PAGE
    counts = {
        "Pages free": pages - 9 * gib,
        "Pages active": 3 * gib,
        "Pages inactive": 3 * gib,
        "Pages speculative": gib,
        "Pages throttled": 0,
        "Pages wired down": gib + gib // 2,
        "Pages purgeable": 20412,
        '"Translation faults"': 291034771,
        "Pages stored in compressor": 1000,
        "Pages occupied by compressor": gib // 2,
        "Swapouts": 0,
    }
    lines = [f"{name + ':':<40}{f'{count}.':>13}" for name, count in counts.items()]
    return "\n".join([f"Mach Virtual Memory Statistics: (page size of {_PAGE} bytes)", *lines])


def pmset_text(mac: Mac) -> str:
    """Return the settings of one source of power, as `pmset -g` lists them."""
    settings = {"Sleep On Power Button": 1, "powernap": 1, "disksleep": 10, "sleep": mac.sleep_minutes}
    settings |= {"ttyskeepawake": 1, "displaysleep": 10, "tcpkeepalive": 1, "lowpowermode": 0, "womp": 1}
    return "\n".join(f" {name:<20} {value}" for name, value in settings.items())


def devinfo_text(recorded: Recorded) -> str:
    """Return `ibv_devinfo`; every port has a link."""
    devices = [row.split()[0] for row in recorded.ibv_devices.splitlines() if "rdma_" in row]
    return "\n".join(
        f"hca_id:\t{device}\n\ttransport:\t\t\tThunderbolt (100)\n\tnode_guid:\t\t\t9093:3a23:2588:ac05\n"
        f"\tphys_port_cnt:\t\t\t1\n\t\tport:\t1\n\t\t\tstate:\t\t\tPORT_ACTIVE (4)\n\t\t\tlink_layer:\t\tThunderbolt\n"
        for device in devices
    )
