"""What a host could not do, in words: each failure that its program describes, as the error that a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from moectl.hosts.onhost.files import Busy, Full, Mismatch, Outside, describe_failure
from moectl.hosts.refusals import put_error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Full(5 * 10**9, 6 * 10**9), "mac1: disk full: 5.0 GB free, 6.0 GB needed for there/x"),
        (Busy("there/x"), "mac1: another push is writing there/x"),
        (Outside("a/../b"), "mac1: a/../b leads out of the shard set's directory"),
        (Mismatch("ab", 0), "here/x is not what its manifest promises"),
        (PermissionError(13, "Permission denied", "there/x"), "mac1: cannot write there/x: Permission denied"),
        (
            ModuleNotFoundError("No module named 'zlib'"),
            "mac1: its python failed: ModuleNotFoundError: No module named",
        ),
    ],
)
def test_what_a_host_could_not_do(error: Exception, message: str) -> None:
    told = put_error(describe_failure(error), Path("here/x"), "there/x", "", "mac1")
    assert str(told).startswith(message)
