"""When a failed cluster is started again."""

from __future__ import annotations

import pytest

from moectl.errors import (
    AuthFailed,
    CheckpointError,
    HostsError,
    IntegrityError,
    LinkLost,
    MoectlError,
    NotDeployed,
    PeerLost,
    PlanError,
    RemoteError,
    Stalled,
    Unreachable,
    VersionMismatch,
)
from moectl.server.restarts import FIRST_S, MOST_S, WITHIN_S, Restarts


def test_the_waits_double_and_the_tries_end() -> None:
    restarts = Restarts(9, clock=lambda: 100.0)
    waits = [restarts.delay_s(PeerLost("x")) for _ in range(10)]
    assert waits == [*(min(MOST_S, FIRST_S * 2**n) for n in range(9)), None]
    assert restarts.total == 9


def test_work_begins_the_waits_anew() -> None:
    restarts = Restarts(9, clock=lambda: 100.0)
    for _ in range(3):
        assert [restarts.delay_s(PeerLost("x")) for _ in range(2)] == [FIRST_S, 2 * FIRST_S]
        restarts.progress()


def test_old_failures_are_forgotten() -> None:
    now_s = 0.0
    restarts = Restarts(2, clock=lambda: now_s)
    for _ in range(10):
        assert restarts.delay_s(RemoteError("x")) is not None
        now_s += WITHIN_S + 1
    assert restarts.total == 10


@pytest.mark.parametrize("kind", [AuthFailed, CheckpointError, IntegrityError, NotDeployed, VersionMismatch])
def test_what_lasts_is_not_tried_again(kind: type[MoectlError]) -> None:
    assert Restarts(5).delay_s(kind("x")) is None


@pytest.mark.parametrize("kind", [RemoteError, PeerLost, Unreachable, MoectlError])
def test_what_may_pass_is(kind: type[MoectlError]) -> None:
    assert Restarts(5).delay_s(kind("x")) == FIRST_S
    assert Restarts(0).delay_s(kind("x")) is None


@pytest.mark.parametrize("kind", [PlanError, HostsError])
def test_memory_and_addresses_may_take_a_while_to_come_back(kind: type[MoectlError]) -> None:
    restarts = Restarts(2)
    assert [restarts.delay_s(kind("not yet")) for _ in range(3)] == [FIRST_S, 2 * FIRST_S, None]


def test_sleep_is_nobodys_fault() -> None:
    restarts = Restarts(1, clock=lambda: 0.0)
    for _ in range(5):
        assert restarts.delay_s(LinkLost("x")) == FIRST_S
        restarts.come_up()
    assert restarts.delay_s(PeerLost("x")) == FIRST_S


def test_slowness_is_met_with_patience() -> None:
    restarts = Restarts(5, clock=lambda: 0.0)
    restarts.delay_s(PeerLost("x"))
    assert restarts.patience == 1
    restarts.delay_s(Stalled("x"))
    restarts.delay_s(Stalled("x"))
    assert restarts.patience == 4


def test_a_sleep_before_anything_started_counts() -> None:
    restarts = Restarts(2)
    assert restarts.delay_s(LinkLost("slept")) is not None
    assert [restarts.delay_s(LinkLost("slept")) is None for _ in range(3)] == [False, False, True]
