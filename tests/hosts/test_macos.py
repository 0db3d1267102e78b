"""What the versions of macOS allow: RDMA between Macs, and the wheels of mlx."""

from __future__ import annotations

import pytest

from moectl.hosts.macos import (
    explain_missing_rdma,
    is_older_wheel,
    parse_version,
    refuse_mac,
    refuse_rdma,
    version_text,
)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("26.2", (26, 2)),
        ("26.3.1", (26, 3)),
        ("26", (26, 0)),
        ("15.7.2", (15, 7)),
        ("16.2", (26, 2)),  # as macOS 26 calls itself to a python that was built with an older SDK
        ("10.16", (10, 16)),
        ("", None),
        (None, None),
        ("unknown", None),
    ],
)
def test_versions(text: str | None, version: tuple[int, int] | None) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("26.2", "26.2.1"), None),
        (("26.3", "26.6.2", "27.0"), None),
        (("26.2", None), None),
        (("26.1", "26.3"), "RDMA over Thunderbolt needs macOS 26.2 or newer: 26.1 on mac0"),
        (("15.7", "26.3"), "RDMA over Thunderbolt needs macOS 26.2 or newer: 15.7 on mac0"),
        (("26.2", "26.3"), "hangs or gives wrong numbers, because .*: 26.2 on mac0, 26.3 on mac1"),
        (("27.0", "26.4", "26.2"), "27.0 on mac0, 26.4 on mac1, 26.2 on mac2"),
    ],
)
def test_macs_that_can_do_rdma_together(told: tuple[str | None, ...], why: str | None) -> None:
    refused = refuse_rdma({f"mac{i}": parse_version(text) for i, text in enumerate(told)})
    if why is None:
        assert refused is None
        return
    assert refused is not None
    with pytest.raises(type(refused), match=why):
        raise refused
    assert (refused.exit_code, "softwareupdate" in str(refused.hint), "--backend ring" in str(refused.hint)) == (
        6,
        True,
        True,
    )


def test_after_the_update_of_the_hint_rdma_is_allowed() -> None:
    refused = refuse_rdma({"a": (26, 2), "b": (26, 4)})
    assert refused is not None
    assert refused.hint == "sudo softwareupdate -ia -R on those with 26.2, or use --backend ring"
    assert refuse_rdma({"a": (26, 4), "b": (26, 4)}) is None
    old = refuse_rdma({"a": (26, 1), "b": (26, 4)})
    assert old is not None
    assert old.hint == "sudo softwareupdate -ia -R there, or use --backend ring"


@pytest.mark.parametrize(
    ("tag", "version", "older"),
    [
        ("macosx_15_0_arm64", (26, 2), True),
        ("macosx_14_0_arm64", (27, 0), True),
        ("macosx_26_0_arm64", (26, 2), False),
        ("macosx_15_0_arm64", (26, 1), False),  # the newer one needs 26.2
        ("macosx_15_0_arm64", (15, 7), False),
        ("macosx_15_0_arm64", None, False),
        ("manylinux_2_35_aarch64", (26, 2), False),
        ("", (26, 2), False),
    ],
)
def test_wheels_that_are_older_than_their_mac(tag: str, version: tuple[int, int] | None, older: bool) -> None:
    assert is_older_wheel(tag, version) == older


def test_an_mlx_without_rdma_is_explained() -> None:
    old = explain_missing_rdma("macosx_15_0_arm64", (26, 3), "mac1")
    assert str(old) == "mac1: its mlx is the wheel for macOS 15, which has no RDMA (JACCL)"
    assert str(old.hint).startswith("moectl deploy, which installs the one for macOS 26")
    other = explain_missing_rdma("manylinux_2_35_x86_64", None, "box")
    assert other.message == "its mlx has no RDMA (JACCL): it is the wheel manylinux_2_35_x86_64"
    assert explain_missing_rdma("", (26, 3), "mac1").message == "its mlx has no RDMA (JACCL)"


def test_macs_that_mlx_has_wheels_for() -> None:
    assert [refuse_mac(text) for text in ("14.0", "26.2", "", None)] == [None] * 4
    assert refuse_mac("13.7.1") == "it has macOS 13.7.1, and mlx needs 14 or newer"
    assert refuse_mac("15.5", "x86_64") == "it is a Mac with an Intel processor, and mlx runs on Apple silicon only"
    assert version_text((26, 2)) == "26.2"
