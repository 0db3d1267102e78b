"""Drive `mlx.distributed_config` with recorded answers of Macs instead of ssh, to compare moectl's set-up with its own.

What it is asked and what it is told to run is MLX's; nothing here decides about addresses, rings or devices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from mlx._distributed_utils import config


@dataclass(frozen=True)
class Recorded:
    """What one Mac's tools print."""

    system_profiler: str
    hardware_ports: str
    ibv_devices: str
    ifconfig: str
    en0: str = ""


@dataclass(frozen=True)
class Generated:
    """What the tool made; None where it refused."""

    hostfile: dict[str, Any] | None
    commands: dict[str, list[str]]


def generate(macs: Mapping[str, Recorded], directory: Path, *flags: str) -> Generated:
    """Return the hostfile and each host's commands for these Macs."""
    output, commands = directory / "mlx-hosts.json", dict[str, list[str]]()
    output.unlink(missing_ok=True)

    def run(argv: Sequence[str], **options: Any) -> Any:
        words = [word for word in argv[1:] if word not in ("-o", "BatchMode=yes", "ConnectTimeout=5")]
        host, told = words[0], " ".join(words[1:])
        answer = _answer(macs[host], told)
        if answer is None:
            commands[host] = told.split(" ; ")
            answer = ""
        return SimpleNamespace(returncode=0, stdout=answer if options.get("text") else answer.encode())

    words = ["config", "--hosts", ",".join(macs), "--auto-setup", "--output-hostfile", str(output), *flags]
    with mock.patch.object(config, "run", run), mock.patch.object(sys, "argv", words):
        try:
            config.main()
        except SystemExit:
            return Generated(None, {})
    return Generated(json.loads(output.read_text()), commands)


def _answer(mac: Recorded, told: str) -> str | None:
    """Return what a Mac prints when asked; None for a command that changes it."""
    questions = {
        "echo success": "success\n",
        "sudo ls": "",
        "system_profiler SPThunderboltDataType -json": mac.system_profiler,
        "networksetup -listallhardwareports": mac.hardware_ports,
        "ibv_devices": mac.ibv_devices,
        "ipconfig getifaddr en0": f"{mac.en0}\n" if mac.en0 else "",
        "ipconfig getifaddr en1": "",
    }
    if told in questions:
        return questions[told]
    assert told.startswith("sudo ifconfig"), told
    return None
