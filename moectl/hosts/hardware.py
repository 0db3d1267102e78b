"""A host's hardware, parsed from the output of its own tools: chip, memory, memory in use, GPU limit, links.

Pure parsers; `survey` runs the tools. Text that is cut off or strange gives None, never an error: a plan can work
without a number, and says which one it assumed.

Sources of the formats: sysctl(8), vm_stat(1), system_profiler(8), sw_vers(1), proc(5), os-release(5), nvidia-smi's
`--help-query-gpu`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moectl.errors import CommandFailed
from moectl.hosts.macos import parse_version
from moectl.hosts.thunderbolt import find_generation, parse_ports, read_items

MARK = "moectl-probe "  # in front of each section's name, see `survey.HARDWARE_SCRIPT`
_MIB = 1 << 20
_MOST = 1 << 60  # a larger number is not a size of real hardware
_NVIDIA = re.compile(r"\b(H100|H200|GB10)\b")
# It shares the memory of the machine: nvidia-smi says [N/A] (docs.nvidia.com/dgx/dgx-spark/known-issues.html).
_UNIFIED = ("gb10",)
_APPLE = re.compile(r"Apple (M\d{1,2})(?: (Pro|Max|Ultra))?")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of one host; None where it is not known."""

    chip: str | None = None  # a name of the chips table, such as "m2-ultra"
    memory_bytes: int | None = None
    in_use_bytes: int | None = None
    wired_limit_bytes: int | None = None  # iogpu.wired_limit_mb where the owner set it
    working_set_bytes: int | None = None  # what its GPU may use now, where the system reports it
    gpu_cores: int | None = None
    cores: int | None = None
    os: str | None = None  # "macOS", "Linux"
    os_version: str | None = None
    thunderbolt: int | None = None  # generation: 5 can do RDMA, 4 (3 and USB4 included) cannot

    @property
    def macos_major(self) -> int | None:
        """The major version of macOS; None on another system, or where it is not known."""
        version = parse_version(self.os_version) if self.os == "macOS" else None
        return version[0] if version else None


def parse_probe(text: str) -> Hardware:
    """Return the hardware from the output of `survey.HARDWARE_SCRIPT`: sections, each after a line "moectl-probe NAME".

    Raises CommandFailed when no section names a known system.
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
    """Return the text after each marker line by its name, without what a login shell printed before the first."""
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
    displays = read_items(system_profiler, "SPDisplaysDataType")
    machines = read_items(system_profiler, "SPHardwareDataType")
    limit = (_count(keys.get("iogpu.wired_limit_mb")) or 0) * _MIB or None  # 0: the system's own choice
    brands = [keys.get("machdep.cpu.brand_string"), *(machine.get("chip_type") for machine in machines)]
    cores = (_count(display.get("sppci_cores")) for display in displays)
    return Hardware(
        chip=next((chip for brand in brands if (chip := apple_chip(brand))), None),
        memory_bytes=_count(keys.get("hw.memsize")),
        in_use_bytes=parse_vm_stat(vm_stat),
        wired_limit_bytes=limit,
        working_set_bytes=limit,
        gpu_cores=next((count for count in cores if count), None),
        cores=_count(keys.get("hw.ncpu")),
        os="macOS",
        os_version=_pairs(sw_vers).get("ProductVersion") or None,
        thunderbolt=find_generation(parse_ports(system_profiler)),
    )


def apple_chip(brand: object) -> str | None:
    """Return "m2-ultra" for "Apple M2 Ultra"; None for anything else, virtual machines included."""
    match = _APPLE.fullmatch(brand.strip()) if isinstance(brand, str) else None
    return "-".join(part.lower() for part in match.groups() if part) if match else None


def parse_vm_stat(text: str) -> int | None:
    """Return the bytes in use by programs: wired, active and compressed pages.

    Inactive, speculative and free pages do not count, because macOS gives them to any program that asks. Active pages
    count although some only cache files: they were used lately and would be read again. So the sum is rather too large.
    """
    size = re.search(r"page size of (\d{1,9}) bytes", text)
    keys = _pairs(text)
    wanted = ("Pages wired down", "Pages active", "Pages occupied by compressor")
    pages = [_count(keys.get(key, "").rstrip(".")) for key in wanted]
    known = [count for count in pages if count is not None]
    return sum(known) * int(size[1]) if size and len(known) == len(wanted) else None


def parse_wired(vm_stat: str) -> int | None:
    """Return the bytes of wired memory, which macOS never moves."""
    size = re.search(r"page size of (\d{1,9}) bytes", vm_stat)
    pages = _count(_pairs(vm_stat).get("Pages wired down", "").rstrip("."))
    return int(size[1]) * pages if size and pages is not None else None


def parse_linux(meminfo: str, cpuinfo: str, os_release: str, nvidia_smi: str = "") -> Hardware:
    """Return a Linux machine's hardware from /proc, os-release and `nvidia-smi`; of several GPUs, the first one's.

    nvidia-smi was asked for name, memory.total and memory.used, without header and units (MiB). MemAvailable is the
    kernel's estimate of the memory that is left without swapping; the rest is in use. The working set is the GPU's free
    memory, because one rank runs on one GPU; a GPU that shares the machine's memory has none of its own.
    """
    keys = _pairs(meminfo)
    total, available = (_kib(keys.get(key)) for key in ("MemTotal", "MemAvailable"))
    gpu = next((row for row in map(_gpu, nvidia_smi.split("\n")) if row), None)
    cores = sum(bool(re.match(r"processor\s*:", line)) for line in cpuinfo.split("\n"))
    release = _pairs(os_release, "=")
    return Hardware(
        chip=gpu[0] if gpu else "linux-cpu" if cores else None,
        memory_bytes=total,
        in_use_bytes=total - available if total is not None and available is not None and available <= total else None,
        working_set_bytes=gpu[1] if gpu else None,
        cores=cores or None,
        os="Linux",
        os_version=release.get("PRETTY_NAME", "").strip("\"'") or None,
    )


def _gpu(line: str) -> tuple[str | None, int | None] | None:
    """Return (name of the chips table or None, free bytes of its own) of a line of nvidia-smi; None for no GPU."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 3:
        return None
    found = _NVIDIA.search(words[0])
    name = found[1].lower() if found else None
    if name in _UNIFIED:
        return name, None
    total, used = _count(words[1]), _count(words[2])
    if not total or used is None or used > total:
        return None
    return name, (total - used) * _MIB


def _pairs(text: str, between: str = ":") -> dict[str, str]:
    split = (line.partition(between) for line in text.split("\n"))
    return {key.strip(): value.strip() for key, found, value in split if found}


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
