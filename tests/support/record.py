"""Record what a host's own tools print, for tests/recordings: moectl's survey of it, without what is private.

    python -m tests.support.record HOST FILE        HOST as in hosts.txt, or an alias of ~/.ssh/config

It changes nothing on the host. Names of users, machines and devices, serial numbers, UUIDs and addresses are replaced,
equal ones by equal ones. Read the file before you send it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moectl.hosts.connect import make_remote
from moectl.hosts.hardware import MARK, split_sections
from moectl.hosts.hostfile import parse_host_string
from moectl.hosts.remote import Remote
from moectl.hosts.survey import SCRIPT, SURVEY_S, read_survey

# What the host calls itself and its user; a command that is missing says nothing.
_NAMES = "id -un; id -F; hostname; hostname -s; scutil --get ComputerName; scutil --get LocalHostName"
# The keys of system_profiler that are kept, and those whose value is replaced.
_KEPT = re.compile(
    r"chip_type|machine_model|machine_name|number_processors|physical_memory|boot_rom_version|os_loader_version"
    r"|sppci_(bus|cores|device_type|model)|spdisplays_(mtlgpufamilysupport|vendor)|_items|_name|mode_key"
    r"|receptacle_\w+_tag|(current_speed|link_status|receptacle_id|receptacle_status|route_string)_key"
    r"|(device_id|device_name|vendor_id|vendor_name|domain_uuid|switch_uid)_key|SP\w+DataType"
)
_OURS = re.compile(
    r"thunderbolt\w*_bus_\d+|hardware_overview|kHW_\w+|Apple M\d.*|iMac|Mac( (mini|Studio|Pro))?|MacBook \w+"
    r"|[A-Z]\w+\d+,\d+"
)
_PORT = re.compile(r"Ethernet.*|Wi-Fi|Thunderbolt( Bridge| \d+)|Bluetooth PAN|USB .*LAN.*")


def record(remote: Remote) -> str:
    """Return the survey of a host, without what is private. Raises HostError, CommandFailed."""
    names = remote.run(["sh", "-c", f"({_NAMES}) 2>/dev/null"], check=False).stdout.decode("utf-8", "replace")
    text = remote.run(["sh", "-c", SCRIPT], timeout_s=SURVEY_S).stdout.decode("utf-8", "replace")
    return clean(text, names.split("\n"))


def clean(text: str, names: list[str] | tuple[str, ...] = ()) -> str:
    """Return a survey without what is private; `names` are the host's and its user's."""
    sections = split_sections(text)
    for name, tidy in (("system_profiler", _clean_profile), ("networksetup", _clean_ports)):
        if name in sections:
            sections[name] = tidy(sections[name])
    text = "".join(f"\n{MARK}{name}\n{body.strip(chr(10))}\n" for name, body in sections.items())
    text = re.sub(r"^Serial\s*:.*\n|^\s*inet6 .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"/(Users|home)/[^/\s]+", r"/\1/ada", text)
    for private in sorted({name.strip() for name in names}, key=len, reverse=True):
        if len(private) > 2 and private not in ("root", "localhost"):
            text = re.sub(rf"(?<!\w){re.escape(private)}(?!\w)", "somename", text)
    hexadecimal = "[0-9A-Fa-f]"
    text = _number(text, rf"\b{hexadecimal}{{8}}(-{hexadecimal}{{4}}){{3}}-{hexadecimal}{{12}}\b", _uuid)
    text = _number(text, rf"\b({hexadecimal}{{1,2}}:){{5}}{hexadecimal}{{1,2}}\b", "02:00:00:00:00:{:02x}".format)
    text = _number(text, rf"\b({hexadecimal}{{4}}:){{3}}{hexadecimal}{{4}}\b", "0000:0000:0000:{:04x}".format)
    text = _number(text, rf"\b(0x)?{hexadecimal}{{16}}\b", "0x{:016X}".format)
    networks: dict[str, int] = {}
    return re.sub(r"(?<![\d.])(\d{1,3}\.\d{1,3}\.\d{1,3})\.(\d{1,3})(?![\d.])", lambda m: _address(m, networks), text)


def _uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def _number(text: str, pattern: str, form: Callable[[int], str]) -> str:
    """Replace each distinct match by its number in the order of appearance."""
    seen: dict[str, int] = {}
    return re.sub(pattern, lambda match: form(seen.setdefault(match[0].upper(), len(seen) + 1)), text)


def _address(match: re.Match[str], networks: dict[str, int]) -> str:
    """Return an address of an invented network; loopback, link-local, masks and 0.0.0.0 stay."""
    if match[1].startswith(("127.", "169.254.", "255.", "0.")):
        return match[0]
    return f"10.0.{networks.setdefault(match[1], len(networks) + 1)}.{match[2]}"


def _clean_profile(text: str) -> str:
    try:
        return json.dumps(_clean_value(json.loads(text)), indent=1)
    except ValueError:
        return ""


def _clean_value(value: Any, key: str = "") -> Any:
    match value:
        case dict():
            return {name: _clean_value(inner, name) for name, inner in value.items() if _KEPT.fullmatch(name)}
        case list():
            return [_clean_value(inner) for inner in value]
        case str() if key in ("_name", "device_name_key") and not _OURS.fullmatch(value):
            return "Device"
        case _:
            return value


def _clean_ports(text: str) -> str:
    def rename(match: re.Match[str]) -> str:
        return match[0] if _PORT.fullmatch(match[1]) else "Hardware Port: Other"

    return re.sub(r"^Hardware Port: (.*)$", rename, text.partition("VLAN Configurations")[0], flags=re.MULTILINE)


def main(words: list[str]) -> None:
    host, path = words
    remote = make_remote(parse_host_string(host).hosts[0])
    try:
        text = record(remote)
    finally:
        remote.close()
    found = read_survey(text)
    Path(path).write_text(text)
    sys.stdout.write(f"{found.hardware}\n{len(found.ports)} Thunderbolt ports\nRead {path} before you send it.\n")


if __name__ == "__main__":
    main(sys.argv[1:])
