"""What MLX's backends say when they fail, and what it means for a group of ranks.

Texts of libmlx and libjaccl 0.32.4 (the strings of their wheels) and of Metal, as MLX quotes it. What they mean was
collected from reports of people who run MLX on Macs: mlx-examples#1200, mlx#3830, #4192, #4209, exo#1847, omlx#1387.
"""

from __future__ import annotations

import re

from moectl.errors import HostUnfit, MoectlError, PeerLate, PeerLost, RemoteError

# How messages of mlx's backends begin: no answer causes such an error.
BACKEND_ERRORS = ("[ring]", "[jaccl]", "[METAL]")
NO_JACCL = "Cannot initialize jaccl distributed backend."  # of an MLX that was built without it
_DEVICES = "'moectl doctor' tells whether RDMA is on; moectl setup writes the devices that are there"
_SETUP = "moectl setup shows the commands that mend it; if that changes nothing, restart that Mac"


def explain_backend(text: str) -> MoectlError | None:
    """Return the error that a backend's message stands for; None where it is no message of a backend."""
    found = _explain_metal(text) or _explain_jaccl(text)
    if found is None and text.startswith(BACKEND_ERRORS):
        return RemoteError(text) if text.startswith("[METAL]") else PeerLost(text)
    return found


def _explain_metal(text: str) -> MoectlError | None:
    if "[metal::load_device] No Metal device" in text:
        return HostUnfit(
            "macOS gives this process no GPU: no Metal device",
            hint="log in at that Mac's screen once; a virtual machine has no GPU for MLX",
        )
    if "[METAL]" not in text:
        return None
    if "ErrorTimeout" in text or "GPU Timeout" in text:
        # On one of many ranks; the session finds the rank that it waited for, and says what to do.
        return PeerLate("its GPU gave up waiting for another rank, which is late or lost (GPU Timeout)")
    if "ImpactingInteractivity" in text or "Impacting Interactivity" in text:
        return RemoteError(
            "macOS took the GPU away to keep its screen responsive (Impacting Interactivity)",
            hint="close programs that draw on that Mac, or take a smaller --prefill-step",
        )
    if "OutOfMemory" in text or "Insufficient Memory" in text:
        return RemoteError(
            "its GPU has too little memory left (Insufficient Memory)",
            hint="close other programs there; 'moectl doctor' tells whether memory of an earlier worker is still held",
        )
    if "InnocentVictim" in text:
        return PeerLost("its GPU threw the work away because of another program's error (Innocent Victim)")
    return None


def _explain_jaccl(text: str) -> MoectlError | None:
    if NO_JACCL in text:
        return HostUnfit(
            "its MLX or its macOS has no JACCL, which RDMA needs",
            hint="'moectl doctor' tells what is missing; --backend ring works without RDMA",
        )
    if "[jaccl]" not in text:
        return None
    said = " ".join(text.split("[jaccl]")[-1].split())
    if "No IPv4-mapped GID" in text:
        return RemoteError("its Thunderbolt port has no IPv4 address, which RDMA needs", hint=_SETUP)
    if match := re.search(r"Changing queue pair to (?:INIT|RTR|RTS) failed with errno (\d+)", text):
        # Trying again may leave the port in a state that only a restart ends.
        return HostUnfit(f"RDMA does not work on its Thunderbolt port: {match[0]}", hint=_SETUP)
    if re.search(r"Creating the queue pair failed|Register memory region failed|Couldn't (?:allocate|create)", text):
        return RemoteError(
            f"its RDMA device has nothing left to give: {said}",
            hint="end what else uses RDMA there (another moectl, mlx.launch, exo); if that changes nothing, "
            "restart that Mac",
        )
    if re.search(r"Could not (?:open|find) device", text):
        return HostUnfit(f"its RDMA device is not there: {said}", hint=_DEVICES)
    return None
