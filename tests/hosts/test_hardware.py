"""Hardware read from recorded outputs of the systems' own tools, and from text that is none."""

from __future__ import annotations

import contextlib
import json
from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from moectl.errors import CommandFailed
from moectl.hosts.hardware import (
    MARK,
    Hardware,
    apple_chip,
    parse_linux,
    parse_macos,
    parse_probe,
    parse_vm_stat,
    split_sections,
)
from tests.support.tiny import json_values

RECORDINGS = Path(__file__).parent.parent / "recordings"
GIB = 1 << 30
PAGE = 16384
ALL = sorted(path.name for path in RECORDINGS.glob("*.txt"))


def read(name: str) -> str:
    return (RECORDINGS / name).read_text()


def test_a_mac_studio() -> None:
    assert parse_probe(read("mac-studio-m2-ultra.txt")) == Hardware(
        chip="m2-ultra",
        memory_bytes=192 * GIB,
        in_use_bytes=(310022 + 812345 + 250) * PAGE,
        wired_limit_bytes=None,
        working_set_bytes=None,
        gpu_cores=60,
        cores=24,
        os="macOS",
        os_version="15.5",
        thunderbolt=4,
    )


def test_a_mac_mini_with_a_raised_limit_and_thunderbolt_5() -> None:
    found = parse_probe(read("mac-mini-m4-pro.txt"))
    assert (found.chip, found.memory_bytes, found.gpu_cores, found.cores) == ("m4-pro", 24 * GIB, 16, 12)
    assert found.wired_limit_bytes == found.working_set_bytes == 20 * GIB
    assert found.in_use_bytes == (160412 + 601230 + 178022) * PAGE
    assert (found.thunderbolt, found.os_version) == (5, "26.2")


def test_a_thunderbolt_5_port_with_a_slow_cable_is_still_one() -> None:
    text = read("mac-mini-m4-pro.txt").replace('"80 Gb/s"', '"40 Gb/s"')
    assert parse_probe(text).thunderbolt == 5  # the other port is idle and says what it can


def test_a_macbook_air() -> None:
    found = parse_probe(read("macbook-air-m1.txt"))
    assert (found.chip, found.memory_bytes, found.gpu_cores, found.cores) == ("m1", 16 * GIB, 7, 8)
    assert found.thunderbolt == 4


def test_a_virtual_mac_has_no_known_chip() -> None:
    found = parse_probe(read("mac-virtual.txt"))
    assert (found.chip, found.memory_bytes, found.cores, found.os) == (None, 7 * GIB, 3, "macOS")
    assert found.gpu_cores is found.thunderbolt is found.wired_limit_bytes is None


def test_a_linux_machine() -> None:
    text = read("linux-cpu.txt")
    found = parse_probe(text)
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.split("\n") if line.endswith(" kB")}
    assert found == Hardware(
        chip="linux-cpu",
        memory_bytes=kib["MemTotal"] * 1024,
        in_use_bytes=(kib["MemTotal"] - kib["MemAvailable"]) * 1024,
        cores=2,
        os="Linux",
        os_version="Debian GNU/Linux 12 (bookworm)",
    )


def test_a_linux_machine_with_gpus() -> None:
    found = parse_probe(read("linux-h100.txt"))
    assert (found.chip, found.memory_bytes) == ("h100", 263782132 * 1024)
    assert found.working_set_bytes == (81559 - 1044) << 20


def test_a_dgx_spark_shares_its_memory() -> None:
    """Texts of two owners: github.com/XuehaiPan/nvitop/pull/208 and unslothai/unsloth/pull/10283."""
    meminfo = "MemTotal:       127600748 kB\nMemAvailable:   118566368 kB\n"
    found = parse_linux(meminfo, "processor : 0\n", "", "NVIDIA GB10, [N/A], [N/A]")
    assert (found.chip, found.memory_bytes) == ("gb10", 127600748 * 1024)
    assert found.working_set_bytes is None  # all of the memory is the GPU's
    assert found.in_use_bytes == (127600748 - 118566368) * 1024


@pytest.mark.parametrize(
    ("version", "major"),
    [("26.2", 26), ("15.5", 15), ("16.0", 26), ("26", 26), ("", None), ("beta", None), ("1234.5", None), ("٢.1", None)],
)
def test_major_versions(version: str, major: int | None) -> None:
    assert Hardware(os="macOS", os_version=version).macos_major == major
    assert Hardware(os="Linux", os_version=version).macos_major is None


@pytest.mark.parametrize(
    ("brand", "chip"),
    [
        ("Apple M1", "m1"),
        ("Apple M3 Max", "m3-max"),
        ("Apple M5 Pro", "m5-pro"),
        ("Apple M2 Ultra\n", "m2-ultra"),
        ("Apple M1 (Virtual)", None),
        ("Intel(R) Core(TM) i7-1068NG7 CPU @ 2.30GHz", None),
        ("", None),
        (7, None),
    ],
)
def test_chips(brand: object, chip: str | None) -> None:
    assert apple_chip(brand) == chip


@pytest.mark.parametrize(
    "smi",
    [
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "NVIDIA H100 80GB HBM3, [N/A], [N/A]",
        "NVIDIA H100 80GB HBM3, 10, 20",
        "NVIDIA H100 80GB HBM3, 0, 0",
        "No devices were found",
    ],
)
def test_what_nvidia_smi_says_without_a_gpu(smi: str) -> None:
    found = parse_linux("", "processor : 0\n", "", smi)
    assert (found.chip, found.working_set_bytes) == ("linux-cpu", None)


def test_a_gpu_that_is_not_in_the_table_still_has_memory() -> None:
    found = parse_linux("", "processor : 0\n", "", "NVIDIA GeForce RTX 4090, 24564, 100")
    assert (found.chip, found.working_set_bytes) == (None, 24464 << 20)


@pytest.mark.parametrize(
    "text",
    [
        "Pages wired down: 1.\nPages active: 1.\nPages occupied by compressor: 1.",  # no page size
        "(page size of 16384 bytes)\nPages wired down: 1.\nPages active: 1.",  # cut off
        "(page size of 16384 bytes)\nPages wired down: 1.\nPages active: many.\nPages occupied by compressor: 1.",
    ],
)
def test_vm_stat_says_all_or_nothing(text: str) -> None:
    assert parse_vm_stat(text) is None


@pytest.mark.parametrize("text", ["", "welcome\n", f"{MARK}system\nFreeBSD\n", f"{MARK}system\n", f"{MARK}system"])
def test_other_systems_are_refused(text: str) -> None:
    with pytest.raises(CommandFailed, match="neither macOS nor Linux"):
        parse_probe(text)


def check(found: Hardware) -> None:
    """Everything is None or of its type, and no number is negative or absurd."""
    numbers = [v for v in astuple(found) if isinstance(v, int)]
    assert all(0 <= n < 1 << 81 for n in numbers)
    assert all(v is None or isinstance(v, int | str) for v in astuple(found))


@given(st.sampled_from(ALL), st.floats(0, 1))
def test_recordings_cut_off_anywhere(name: str, where: float) -> None:
    text = read(name)
    cut = text[: int(len(text) * where)]
    try:
        check(parse_probe(cut))
    except CommandFailed:
        # Only the system's name is needed; once it has come through, nothing is refused.
        assert split_sections(cut).get("system", "").strip() not in ("Darwin", "Linux")


@given(st.sampled_from(ALL), st.data())
def test_recordings_with_a_piece_replaced(name: str, data: st.DataObject) -> None:
    text = read(name)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 200)))
    hostile = st.text(max_size=40) | st.integers().map(str) | st.sampled_from(["[" * 3000, "-1", "9" * 5000, "٣", "\0"])
    piece = data.draw(hostile)
    with contextlib.suppress(CommandFailed):
        check(parse_probe(text[:start] + piece + text[stop:]))


@given(st.text(), st.text(), st.text() | json_values.map(str), st.text())
def test_any_text_of_a_mac(sysctl: str, vm_stat: str, profile: str, sw_vers: str) -> None:
    check(parse_macos(sysctl, vm_stat, profile, sw_vers))


@given(
    st.dictionaries(st.sampled_from(["SPDisplaysDataType", "SPHardwareDataType", "SPThunderboltDataType"]), json_values)
)
def test_any_json_of_system_profiler(profile: dict[str, object]) -> None:
    check(parse_macos("", "", json.dumps(profile), ""))


@given(st.text(), st.text(), st.text(), st.text())
def test_any_text_of_linux(meminfo: str, cpuinfo: str, release: str, smi: str) -> None:
    check(parse_linux(meminfo, cpuinfo, release, smi))
