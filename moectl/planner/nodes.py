"""Make the planner's nodes: numbers from hosts.txt, the flags, the table of chips, and the results of a probe.

It asks no host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moectl.errors import HostsError
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.planner.calibration import Calibration
from moectl.planner.chips import (
    Chip,
    default_working_set_bytes,
    find_chip,
    find_price,
    find_reading,
    installed_bytes,
    sizes_sold,
)
from moectl.planner.memory import CPU_DTYPE_BYTES, METAL_DTYPE_BYTES, Memory
from moectl.planner.plan import Node
from moectl.planner.speed import Rates


@dataclass(frozen=True, slots=True)
class Defaults:
    """The chip and memory of every host without its own."""

    chip: str | None = None
    memory_bytes: int | None = None


def make_node(
    host: Host,
    calibration: Calibration,
    defaults: Defaults = Defaults(),
    found: Hardware | None = None,
    *,
    ranks: int = 1,
) -> Node:
    """Return one of a host's ranks as a node: by its own keys, then by what was found there, then by the defaults.

    Raises HostsError when none of them names its chip or its memory.
    """
    chip = _chip(host, defaults, found)
    memory = _memory(host, defaults, found, chip)
    return Node(
        host.name,
        memory=replace(memory, ranks=ranks),
        rates=_rates(chip, calibration),
        dtype_bytes=CPU_DTYPE_BYTES if chip.name == "linux-cpu" else METAL_DTYPE_BYTES,
        price=host.price if host.price is not None else find_price(chip, memory.total),
        is_mac=is_apple(chip),
        rdma=chip.rdma or not is_apple(chip),
        assumed=_assumed(memory, found, chip),
    )


def _assumed(memory: Memory, found: Hardware | None, chip: Chip) -> str:
    """Return what is only assumed of a Mac's memory; empty where a limit was set, or was read on a Mac like it."""
    macos = found.macos_major if found else None
    if not is_apple(chip) or find_reading(memory.total, macos) is not None:
        return ""
    if memory.working_set is None or memory.working_set != default_working_set_bytes(memory.total, macos):
        return ""
    version = "macOS" if macos is None else f"macOS {macos}"
    return (
        f"no reading of the GPU's limit is known for {memory.total / (1 << 30):.0f} GiB with {version}: "
        f"{memory.working_set / 1e9:.1f} GB is a rule of thumb; --probe asks Macs that have moectl"
    )


def is_apple(chip: Chip) -> bool:
    """Whether a chip shares its memory with macOS."""
    return chip.name.startswith("m")


def _chip(host: Host, defaults: Defaults, found: Hardware | None) -> Chip:
    name = host.chip or (found.chip if found else None) or defaults.chip
    if name is None:
        raise HostsError(
            "its chip is not known",
            host=host.name,
            hint=f"write '{host.name} chip=m2-ultra memory=192GB' in the hosts file, use --chip, or --probe to ask it",
        )
    try:
        return find_chip(name)
    except HostsError as error:
        error.host = host.name
        raise


def _memory(host: Host, defaults: Defaults, found: Hardware | None, chip: Chip) -> Memory:
    if found is not None and found.memory_bytes:
        total, working_set = found.memory_bytes, found.wired_limit_bytes or found.working_set_bytes
        if is_apple(chip) and working_set is None:
            working_set = default_working_set_bytes(total, found.macos_major)
        if host.memory_bytes is not None:  # the rest is for its owner
            working_set = min(host.memory_bytes, working_set or host.memory_bytes)
        return Memory(total, working_set, found.in_use_bytes or 0)
    stated = host.memory_bytes or defaults.memory_bytes
    if stated is None:
        sizes = ", ".join(f"{size}GB" for size in chip.memory_gib) or "64GB"
        raise HostsError(
            "its memory is not known",
            host=host.name,
            hint=f"write memory=… in the hosts file ({chip.title}: {sizes}), use --memory, or --probe to ask it",
        )
    return stated_memory(chip, stated)


def stated_memory(chip: Chip, stated_bytes: int) -> Memory:
    """Return the memory of a host of which only a size is known.

    A size that is sold with the chip is that of the whole machine; another size is a part of a larger machine.
    """
    if not is_apple(chip):
        return Memory(stated_bytes)
    installed = installed_bytes(chip, stated_bytes)
    if installed != stated_bytes or installed in {size << 30 for size in sizes_sold(chip)}:
        return Memory(installed, default_working_set_bytes(installed))
    larger = [size << 30 for size in chip.memory_gib if size << 30 > stated_bytes]
    whole = min(larger, default=stated_bytes)
    return Memory(whole, min(stated_bytes, default_working_set_bytes(whole)))


def _rates(chip: Chip, calibration: Calibration) -> Rates:
    return Rates(
        chip.bandwidth_gb_s * 1e9 * calibration.memory_efficiency,
        chip.fp16_tflops * 1e12 * calibration.compute_efficiency,
        None if is_apple(chip) or chip.name == "linux-cpu" else calibration.nvidia_overhead_s,
    )


def default_link(hosts: Sequence[Host]) -> str:
    """Return the kind of link to assume: RDMA where every host names its devices, 10 GbE otherwise."""
    return "rdma" if len(hosts) > 1 and all(host.rdma for host in hosts) else "10gbe"
