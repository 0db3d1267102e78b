"""What an owner of a Mac records is read by the parsers, and holds nothing that is private."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moectl.hosts.connect import make_remote
from moectl.hosts.hardware import MARK
from moectl.hosts.hostfile import Host
from moectl.hosts.survey import read_survey
from tests.support import record
from tests.support.cabling import mesh
from tests.support.fake_mac import record_mac, start_mac
from tests.support.macs import MACS
from tests.support.sshd import Server

RECORDINGS = Path(__file__).parent.parent / "recordings"


def test_a_mac_is_recorded_by_the_command_that_the_readme_names(
    sshd: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mac = start_mac(sshd, tmp_path / "mac0", 0, record_mac(MACS["studio-m4-max"], 0, mesh(2)), MACS["studio-m4-max"])
    with mac.running(501, "/Users/grace/.moectl/env/bin/python -m moectl worker"):
        record.main(["mac0", str(tmp_path / "mac.txt")])
    text = (tmp_path / "mac.txt").read_text()
    found = read_survey(text)
    assert (found.hardware.chip, found.hardware.gpu_cores, found.macos_version, found.build) == (
        "m4-max",
        40,
        (26, 2),
        "25C56",
    )
    assert [(port.interface, port.rdma, port.link_bit_s) for port in found.ports][:2] == [
        ("en2", "rdma_en2", 80_000_000_000),
        ("en3", "rdma_en3", None),
    ]
    assert found.ports[0].peer_domain is not None
    assert (found.addresses, found.workers_bytes) == (
        ("169.254.205.255", "10.0.1.1", "127.0.0.1"),
        512000 << 10,
    )
    for private in ("H9XK2F7QLC", "12345678-9ABC", "grace", str(tmp_path), "9093:3a23", "e0c5797d"):
        assert private not in text
    assert mac.refused == []
    assert "Thunderbolt ports" in capsys.readouterr().out
    assert "python -m tests.support.record HOST FILE" in (RECORDINGS / "README.md").read_text()


def test_this_machine_is_recorded_too(sshd: Server) -> None:
    with_ssh = make_remote(Host(sshd.add_alias("node0")))
    text = record.record(with_ssh)
    with_ssh.close()
    found = read_survey(text)
    assert found.hardware.os == "Linux"
    assert found.hardware.memory_bytes
    assert all(re.match(r"127\.|169\.254\.|10\.0\.", address) for address in found.addresses)


@pytest.mark.parametrize("name", [path.relative_to(RECORDINGS).as_posix() for path in RECORDINGS.rglob("*.txt")])
def test_cleaning_keeps_what_the_parsers_read(name: str) -> None:
    text = (RECORDINGS / name).read_text()
    if MARK not in text:
        return
    before, after = read_survey(text), read_survey(record.clean(text))
    assert after.hardware == before.hardware
    assert after.build == before.build
    assert [(p.interface, p.rdma, p.link_bit_s, p.most_bit_s) for p in after.ports] == [
        (p.interface, p.rdma, p.link_bit_s, p.most_bit_s) for p in before.ports
    ]
    assert len(after.addresses) == len(before.addresses)
    assert record.clean(record.clean(text)) == record.clean(text)


def test_what_is_private_is_replaced_and_what_is_equal_stays_equal() -> None:
    text = """Last login: grace
moectl-probe system
Darwin
moectl-probe workers
 5000 /Users/grace/.moectl/env/bin/python -m moectl worker --host hopper.local
moectl-probe system_profiler
{"SPHardwareDataType": [{"serial_number": "C02", "provisioning_UDID": "1", "chip_type": "Apple M4"}],
 "SPThunderboltDataType": [
  {"_items": [{"_name": "Grace's disk", "domain_uuid_key": "abcdef01-0000-4000-8000-00000000000a"},
  {"_name": "Mac mini", "domain_uuid_key": "ABCDEF01-0000-4000-8000-00000000000A"}]}]}
moectl-probe networksetup
Hardware Port: Grace's VPN
Device: utun3
Ethernet Address: a0:b1:c2:d3:e4:f5
moectl-probe ifconfig
en0: flags=8863<UP> mtu 1500
\tether a0:b1:c2:d3:e4:f5
\tinet6 fe80::1021:1bac:fe1:b5e3%en0 prefixlen 64
\tinet 84.12.7.9 netmask 0xffffff00 broadcast 84.12.7.255
\tinet 127.0.0.1 netmask 0xff000000
"""
    found = record.clean(text, ["grace", "Grace Hopper", "hopper.local", "hopper"])
    for private in ("grace", "Grace", "hopper", "C02", "UDID", "ABCDEF01", "abcdef01", "a0:b1", "fe80", "84.12", "VPN"):
        assert private not in found
    assert found.count("00000000-0000-4000-8000-000000000001") == 2
    assert found.count("02:00:00:00:00:01") == 2
    assert "inet 10.0.1.9 netmask 0xffffff00 broadcast 10.0.1.255" in found
    assert "inet 127.0.0.1" in found
