"""What a host is made of, read from what its own tools print: chip, memory, what is in use, GPU limit, links.

Pure parsers of text; running the tools is `probe`'s. Text that is cut off or strange gives None fields, never an error:
a plan can do without a number, and says which one it had to assume.

Sources of the formats: sysctl(8), vm_stat(1), system_profiler(8), sw_vers(1), proc(5), os-release(5), nvidia-smi's
`--help-query-gpu`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from moectl.errors import CommandFailed
from moectl.hosts.thunderbolt import find_generation, read_ports

MARK = "moectl-probe "  # in front of each section's name, see `probe.HARDWARE_SCRIPT`
_MIB = 1 << 20
_MOST = 1 << 60  # no machine has more of anything; such a number is noise
_APPLE = re.compile(r"Apple (M\d{1,2})(?: (Pro|Max|Ultra))?")


@dataclass(frozen=True, slots=True)
class Hardware:
    """One host; None where it did not say."""

    chip: str | None = None  # a name of the chips table, such as "m2-ultra"
    memory_bytes: int | None = None
    in_use_bytes: int | None = None
    wired_limit_bytes: int | None = None  # iogpu.wired_limit_mb where the owner set it
    working_set_bytes: int | None = None  # what its GPU may use now, where the system says so
    gpu_cores: int | None = None
    cores: int | None = None
    os: str | None = None  # "macOS", "Linux"
    os_version: str | None = None
    thunderbolt: int | None = None  # generation: 5 can do RDMA, 4 (3 and USB4 included) cannot


def parse_probe(text: str) -> Hardware:
    """Return the hardware told by one run of `probe.HARDWARE_SCRIPT`: sections, each behind a line "moectl-probe NAME".

    Raises CommandFailed when there is no section that names a known system.
    """
    found = split_sections(text)
    match found.get("system", "").strip():
        case "Darwin":
            names = ("sysctl", "vm_stat", "system_profiler", "sw_vers")
            return parse_macos(*(found.get(name, "") for name in names))
        case "Linux":
            names = ("meminfo", "cpuinfo", "os-release", "nvidia-smi")
            return parse_linux(*(found.get(name, "") for name in names))
        case other:
            raise CommandFailed(f"it is neither macOS nor Linux: it calls itself {other[:40]!r}")


def split_sections(text: str) -> dict[str, str]:
    """Return the text behind each marker line by its name; what a login shell printed before the first is left out."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith(MARK):
            lines = sections.setdefault(line.removeprefix(MARK).strip(), [])
        else:
            lines.append(line)
    return {name: "\n".join(body) for name, body in sections.items()}


def parse_macos(sysctl: str, vm_stat: str, system_profiler: str, sw_vers: str) -> Hardware:
    """Return a Mac's hardware from `sysctl`, `vm_stat`, `system_profiler -json` and `sw_vers`."""
    keys = _pairs(sysctl)
    profile = _read_json(system_profiler)
    displays = _items(profile, "SPDisplaysDataType")
    machines = _items(profile, "SPHardwareDataType")
    limit = _count(keys.get("iogpu.wired_limit_mb"))
    brands = [keys.get("machdep.cpu.brand_string"), *(machine.get("chip_type") for machine in machines)]
    cores = (_count(display.get("sppci_cores")) for display in displays)
    return Hardware(
        chip=next((chip for brand in brands if (chip := apple_chip(brand))), None),
        memory_bytes=_count(keys.get("hw.memsize")),
        in_use_bytes=parse_vm_stat(vm_stat),
        wired_limit_bytes=limit * _MIB if limit else None,  # 0: the system's own choice
        working_set_bytes=limit * _MIB if limit else None,
        gpu_cores=next((count for count in cores if count), None),
        cores=_count(keys.get("hw.ncpu")),
        os="macOS",
        os_version=_pairs(sw_vers).get("ProductVersion") or None,
        thunderbolt=find_generation(read_ports(_items(profile, "SPThunderboltDataType"))),
    )


def apple_chip(brand: object) -> str | None:
    """Return "m2-ultra" for "Apple M2 Ultra"; None for anything else, virtual machines included."""
    match = _APPLE.fullmatch(brand.strip()) if isinstance(brand, str) else None
    return "-".join(part.lower() for part in match.groups() if part) if match else None


def parse_vm_stat(text: str) -> int | None:
    """Return the bytes that cannot be had without taking them from somebody: wired, active and compressed pages.

    Inactive, speculative and free pages are left out, because macOS gives them up for whoever asks. Active ones count
    although some only cache files: they were used lately and would be read again at once. So the sum errs upwards.
    """
    size = re.search(r"page size of (\d{1,9}) bytes", text)
    keys = _pairs(text)
    wanted = ("Pages wired down", "Pages active", "Pages occupied by compressor")
    pages = [_count(keys.get(key, "").rstrip(".")) for key in wanted]
    known = [count for count in pages if count is not None]
    return sum(known) * int(size[1]) if size and len(known) == len(wanted) else None


def parse_linux(meminfo: str, cpuinfo: str, os_release: str, nvidia_smi: str = "") -> Hardware:
    """Return a Linux machine's hardware from /proc, os-release and `nvidia-smi`; of several GPUs, the first one's.

    nvidia-smi was asked for name, memory.total and memory.used, without header and units (MiB). In use is what is not
    MemAvailable: the kernel's own estimate of what can be had without swapping. The working set is the GPU's free
    memory, since one rank runs on one GPU.
    """
    keys = _pairs(meminfo)
    total, available = (_kib(keys.get(key)) for key in ("MemTotal", "MemAvailable"))
    gpu = next((row for row in map(_gpu, nvidia_smi.split("\n")) if row), None)
    cores = sum(bool(re.match(r"processor\s*:", line)) for line in cpuinfo.split("\n"))
    release = _assignments(os_release)
    return Hardware(
        chip=gpu[0] if gpu else "linux-cpu" if cores else None,
        memory_bytes=total,
        in_use_bytes=total - available if total is not None and available is not None and available <= total else None,
        working_set_bytes=gpu[1] if gpu else None,
        cores=cores or None,
        os="Linux",
        os_version=release.get("PRETTY_NAME") or None,
    )


def _gpu(line: str) -> tuple[str | None, int] | None:
    """Return (name of the chips table or None, free bytes) of one line of nvidia-smi; None when it is no GPU."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 3:
        return None
    total, used = _count(words[1]), _count(words[2])
    if not total or used is None or used > total:
        return None
    name = re.search(r"\b(H100|H200)\b", words[0])
    return name[1].lower() if name else None, (total - used) * _MIB


def _pairs(text: str) -> dict[str, str]:
    split = (line.partition(":") for line in text.split("\n"))
    return {key.strip(): value.strip() for key, colon, value in split if colon}


def _assignments(text: str) -> dict[str, str]:
    split = (line.partition("=") for line in text.split("\n"))
    return {key.strip(): value.strip().strip("\"'") for key, equals, value in split if equals}


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _items(profile: Any, kind: str) -> list[dict[str, Any]]:
    listed = profile.get(kind) if isinstance(profile, dict) else None
    return [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []


def _count(value: object) -> int | None:
    """Return a whole number that a machine can have; None for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    if not re.fullmatch(r"[0-9]{1,19}", text):
        return None
    count = int(text)
    return count if count < _MOST else None


def _kib(value: str | None) -> int | None:
    count = _count((value or "").removesuffix("kB"))
    return None if count is None else count << 10
