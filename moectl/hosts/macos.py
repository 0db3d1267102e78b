"""macOS's versions: what mlx and RDMA over Thunderbolt ask of them, and of the wheel of mlx that was installed.

Pure: what hosts told goes in. Sources: mlx's CMakeLists.txt and its macOS wheels (JACCL is linked in the one for macOS
26 alone, whose libraries are built for 26.2; mlx#4525), jaccl/rdma.h (`buffer_size_from_message`: larger frames from
26.3 on), and CPython#135675 (macOS 26 calls itself 16 to a python that was built with an older SDK).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moectl.errors import VersionMismatch

Version = tuple[int, int]
MLX_MACOS: Version = (14, 0)  # the oldest that mlx has wheels for
RDMA_MACOS: Version = (26, 2)  # the first that has RDMA over Thunderbolt
FRAMES_MACOS: Version = (26, 3)  # from here on JACCL sends larger frames, which an older one does not understand
# Apple's own ssh is exempt, and so are programs that sshd starts.
LOCAL_NETWORK = "macOS's Local Network privacy refuses it"
LOCAL_NETWORK_FIX = (
    "System Settings, Privacy & Security, Local Network: allow the terminal that you use, then open it again"
)


def parse_version(text: str | None) -> Version | None:
    """Return (26, 2) of "26.2.1"; None for what is no version. 16, which macOS 26 calls itself, is 26."""
    match = re.match(r"(\d{1,3})(?!\d)(?:\.(\d{1,4}))?", text or "", re.ASCII)
    if match is None:
        return None
    major = int(match[1])
    return (major + 10 if 16 <= major < 26 else major), int(match[2] or 0)


def version_text(version: Version) -> str:
    """Return "26.2"."""
    return ".".join(map(str, version))


def wheel_version(tag: str) -> Version | None:
    """Return the macOS that a wheel was built for by its platform tag, "macosx_15_0_arm64"; None for another system."""
    match = re.match(r"macosx_(\d{1,3})_(\d{1,3})_", tag)
    return (int(match[1]), int(match[2])) if match else None


def is_older_wheel(tag: str, version: Version | None) -> bool:
    """Whether mlx was installed from the wheel for an older macOS than the one with RDMA, which this Mac could have."""
    built = wheel_version(tag)
    return built is not None and version is not None and version >= RDMA_MACOS and built[0] < RDMA_MACOS[0]


def refuse_mac(text: str | None, machine: str = "arm64") -> str | None:
    """Return why mlx has no wheel for a Mac, an old macOS or an Intel processor; None where it has one."""
    version = parse_version(text)
    if version is None:
        return None
    if machine == "x86_64":
        return "it is a Mac with an Intel processor, and mlx runs on Apple silicon only"
    if version < MLX_MACOS:
        return f"it has macOS {text}, and mlx needs {MLX_MACOS[0]} or newer"
    return None


def refuse_rdma(versions: Mapping[str, Version | None]) -> VersionMismatch | None:
    """Return why Macs of these versions, by host, cannot do RDMA with each other; None where they can.

    A host without a version is left out.
    """
    known = {name: version for name, version in versions.items() if version is not None}
    old = {name: version for name, version in known.items() if version < RDMA_MACOS}
    if old:
        return VersionMismatch(
            f"RDMA over Thunderbolt needs macOS {version_text(RDMA_MACOS)} or newer: {_name(old)}",
            hint="sudo softwareupdate -ia -R there, or use --backend ring",
        )
    if len({version >= FRAMES_MACOS for version in known.values()}) > 1:
        return VersionMismatch(
            f"RDMA between macOS {version_text(RDMA_MACOS)} and a newer one hangs or gives wrong numbers,"
            f" because they divide what they send in different ways: {_name(known)}",
            hint=f"sudo softwareupdate -ia -R on those with {version_text(RDMA_MACOS)}, or use --backend ring",
        )
    return None


def explain_missing_rdma(tag: str, version: Version | None, host: str) -> VersionMismatch:
    """Return why the mlx of a host cannot do RDMA, by the tag of its wheel."""
    if is_older_wheel(tag, version):
        built = wheel_version(tag) or RDMA_MACOS
        return VersionMismatch(
            f"its mlx is the wheel for macOS {built[0]}, which has no RDMA (JACCL)",
            host=host,
            hint="moectl deploy, which installs the one for macOS 26; until then use --backend ring",
        )
    return VersionMismatch(
        f"its mlx has no RDMA (JACCL){f': it is the wheel {tag}' if tag else ''}",
        host=host,
        hint="use --backend ring",
    )


def _name(versions: Mapping[str, Version]) -> str:
    return ", ".join(f"{version_text(version)} on {name}" for name, version in versions.items())
