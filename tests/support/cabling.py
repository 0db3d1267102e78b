"""Write what macOS's tools would print about Macs that are cabled in a given way.

The layout is that of tests/recordings/thunderbolt. It is no parser and knows nothing of moectl's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

End = tuple[int, int]  # (Mac, receptacle from 1)


def domain(mac: int, receptacle: int) -> str:
    """Return the domain UUID that a Mac's port has in all these texts."""
    return f"0000{mac:04X}-{receptacle:04X}-4000-8000-000000000000"


def profiler_json(
    mac: int,
    cables: Sequence[tuple[End, End]],
    *,
    ports: int = 4,
    link_gbit: int = 80,
    idle_gbit: int = 120,
    name: str = "Mac Studio",
) -> str:
    """Return `system_profiler -json SPThunderboltDataType` of one Mac."""
    peers: dict[End, End] = {}
    for one, other in cables:
        peers |= {one: other, other: one}
    buses = [_bus(mac, number, peers.get((mac, number)), link_gbit, idle_gbit, name) for number in range(1, ports + 1)]
    return json.dumps({"SPThunderboltDataType": buses[::-1]}, indent=1)  # it lists the last bus first


def _bus(mac: int, number: int, peer: End | None, link_gbit: int, idle_gbit: int, name: str) -> dict[str, Any]:
    tag = {
        "current_speed_key": f"{link_gbit} Gb/s" if peer else f"Up to {idle_gbit} Gb/s",
        "link_status_key": "0x2" if peer else "0x100",
        "receptacle_id_key": str(number),
        "receptacle_status_key": "receptacle_connected" if peer else "receptacle_no_devices_connected",
    }
    bus: dict[str, Any] = {
        "_name": f"thunderboltusb4_bus_{number - 1}",
        "device_name_key": name,
        "domain_uuid_key": domain(mac, number),
        "receptacle_1_tag": tag,
        "route_string_key": "0",
        "switch_uid_key": f"0x{mac:08X}{number:08X}",
        "vendor_name_key": "Apple Inc.",
    }
    if peer:
        item = {
            "_name": name,
            "device_id_key": "0xA",
            "device_name_key": "Mac15,14",
            "domain_uuid_key": domain(*peer),
            "services_title": [{"_name": "service_ip", "protocol_id_key": 1}],
            "vendor_id_key": "0x0A27",
            "vendor_name_key": "Apple Inc.",
        }
        bus = {"_items": [item], **bus}
    return bus


def hardware_ports_text(interfaces: Mapping[int, str]) -> str:
    """Return `networksetup -listallhardwareports` of a Mac whose receptacles have these interfaces."""
    rows = [("Ethernet", "en0"), ("Thunderbolt Bridge", "bridge0"), ("Wi-Fi", "en1")]
    rows += [(f"Thunderbolt {number}", name) for number, name in interfaces.items()]
    blocks = [
        f"Hardware Port: {port}\nDevice: {device}\nEthernet Address: 02:00:00:00:00:{place:02x}\n"
        for place, (port, device) in enumerate(rows)
    ]
    return "\n" + "\n".join(blocks) + "\nVLAN Configurations\n===================\n"


def ibv_devices_text(interfaces: Sequence[str]) -> str:
    """Return `ibv_devices` of a Mac with RDMA on; an empty list is one with RDMA off."""
    head = "    device          \t   node GUID\n    ------          \t----------------\n"
    return head + "".join(f"    rdma_{name:<11}\te0c5797d9c8fac{place:02x}\n" for place, name in enumerate(interfaces))


def mesh(count: int) -> list[tuple[End, End]]:
    """Return one cable between every two Macs, in the receptacles that TN3205's pictures use."""
    return [((a, b), (b, a + 1)) for a in range(count) for b in range(a + 1, count)]


def ring(count: int) -> list[tuple[End, End]]:
    """Return one cable from each Mac's receptacle 2 to the next one's receptacle 1."""
    return [((a, 2), ((a + 1) % count, 1)) for a in range(count)]
