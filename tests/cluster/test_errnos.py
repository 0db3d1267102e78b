"""Error numbers of both systems, by name and with what mends them."""

from __future__ import annotations

import errno

import pytest

from moectl.cluster.doctor.errnos import _LINUX, _MEANINGS, explain, find_error


@pytest.mark.parametrize(
    ("text", "macos", "name"),
    [
        ("[jaccl] Changing queue pair to RTR failed with errno 22", True, "EINVAL"),
        ("Changing queue pair to RTR failed with errno 96", True, "ENODATA"),
        ("[ring] Couldn't connect (error: 60)", True, "ETIMEDOUT"),
        ("[jaccl] Recv failed with errno=60", True, "ETIMEDOUT"),
        ("[Errno 65] No route to host", True, "EHOSTUNREACH"),
        ("[Errno 113] No route to host", False, "EHOSTUNREACH"),
        ("(error: 61)", True, "ECONNREFUSED"),
        ("errno 16", True, "EBUSY"),
        ("[jaccl] Creating the queue pair failed with 'Resource busy (16)'.", True, "EBUSY"),
        ("errno 7", True, None),
        ("65 tokens", True, None),
    ],
)
def test_numbers_in_messages(text: str, macos: bool, name: str | None) -> None:
    assert find_error(text, macos=macos) == name


def test_linux_numbers_are_those_of_linux() -> None:
    assert {number: errno.errorcode[number] for number in _LINUX} == _LINUX or errno.ECONNREFUSED != 111


def test_local_network_privacy_is_for_programs_that_sshd_did_not_start() -> None:
    here = explain("EHOSTUNREACH", macos=True, local=True)
    there = explain("EHOSTUNREACH", macos=True)
    assert here is not None
    assert there is not None
    assert "Local Network privacy" in here.why
    assert "Local Network" in here.fix
    assert "cable" in there.why
    assert explain("EHOSTUNREACH", macos=False, local=True) == there


def test_every_meaning_has_a_way_out() -> None:
    assert all(meaning.why and meaning.fix for meaning in _MEANINGS.values())
    assert explain("EUNHEARDOF", macos=True) is None
