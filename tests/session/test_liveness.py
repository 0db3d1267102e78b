"""Who is dead, who is slow, and who only slept: judged over made-up times."""

from __future__ import annotations

import time

import pytest

from moectl.session import liveness
from moectl.session.liveness import FACTOR, LEAST_S, Pulse, Sleep, StepDeadline


class Clock:
    """Stands in for the clocks of `moectl.session.liveness`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(liveness, "_now_s", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_beats_in_a_row_are_counted(clock: Clock) -> None:
    pulse = Pulse()
    pulse.hear()
    assert [pulse.count(3) for _ in range(3)] == [False, False, False]  # the first beat saw the answer
    clock.now_s += 1
    pulse.hear()
    assert [pulse.count(3) for _ in range(5)] == [False, False, False, True, False]


def test_beats_that_want_no_answer_are_no_misses(clock: Clock) -> None:
    pulse = Pulse()
    pulse.hear()
    assert not pulse.count(4)
    assert not any(pulse.count(4, asked=False) for _ in range(100))
    # One was missed before; the first here still looks at a beat that wanted none.
    assert [pulse.count(4) for _ in range(4)] == [False, False, False, True]


def test_less_may_be_allowed_than_is_missed_already(clock: Clock) -> None:
    pulse = Pulse()
    pulse.hear()
    assert not any(pulse.count(15) for _ in range(11))
    assert [pulse.count(4) for _ in range(3)] == [True, False, False]


def test_a_sleep_is_one_missed_beat(clock: Clock) -> None:
    pulse = Pulse()
    for _ in range(10):
        clock.now_s += 3600
        assert not pulse.count(2)
        clock.now_s += 1
        pulse.hear()


def test_a_machine_that_slept_knows_it_for_a_while(clock: Clock) -> None:
    sleep = Sleep()
    for _ in range(5):
        clock.now_s += 1
        sleep.beat()
        assert sleep.slept_s is None
    clock.now_s += 60
    assert sleep.slept_s == 60  # before its beat noticed
    sleep.beat()
    clock.now_s += 1
    assert sleep.slept_s == 60
    for _ in range(12):
        clock.now_s += 1
        sleep.beat()
    assert sleep.slept_s is None


def test_what_was_never_measured_gets_the_longest_time(clock: Clock) -> None:
    deadline = StepDeadline(120, 512)
    deadline.expect(1, is_first=True)
    assert deadline.seconds == 120
    clock.now_s += 100
    assert deadline.left_s == 20
    clock.now_s += 100
    assert deadline.left_s == 0


def test_steps_are_judged_by_the_slowest_one(clock: Clock) -> None:
    deadline = StepDeadline(120, 512)
    deadline.expect(1, is_first=True)
    for pause_s in (3, 0.5, 1, 0.2):  # the first is the prompt's
        clock.now_s += pause_s
        deadline.step(1)
    assert deadline.seconds == FACTOR * 1
    clock.now_s += 4
    assert deadline.left_s == FACTOR - 4
    deadline.forgive()
    assert deadline.left_s == FACTOR


def test_quick_steps_get_the_least_time_and_patience_more(clock: Clock) -> None:
    for patience in (1.0, 4.0):
        deadline = StepDeadline(120, 512, patience)
        deadline.expect(1, is_first=True)
        for _ in range(3):
            clock.now_s += 0.01
            deadline.step(1)
        assert deadline.seconds == LEAST_S * patience


def test_tokens_of_the_cache_took_no_time(clock: Clock) -> None:
    deadline = StepDeadline(120, 128)
    deadline.expect(1, is_first=True)
    clock.now_s += 1
    deadline.read(1, 400, cached=300)  # 10 ms for each of the hundred
    assert deadline.seconds == pytest.approx(FACTOR * 1.28)
    clock.now_s += 2
    deadline.read(1, 500, cached=300)
    assert deadline.seconds == pytest.approx(FACTOR * 2.56)


def test_a_prompt_beside_quick_answers_has_the_time_of_its_tokens(clock: Clock) -> None:
    deadline = StepDeadline(120, 512)
    deadline.expect(1, is_first=True)
    for tokens in (100, 200):
        clock.now_s += 1  # 10 ms for each
        deadline.read(1, tokens)
    assert deadline.is_reading
    assert deadline.seconds == pytest.approx(FACTOR * 5.12)
    deadline.step(1)
    assert not deadline.is_reading
    clock.now_s += 0.1
    deadline.step(1)
    assert deadline.seconds == LEAST_S
    deadline.expect(2, is_first=False)
    assert deadline.seconds == pytest.approx(FACTOR * (5.12 + 0.1))
    deadline.forget(2)
    assert deadline.seconds == LEAST_S


def test_a_few_tokens_say_nothing_of_a_chunk(clock: Clock) -> None:
    deadline = StepDeadline(120, 500)
    deadline.learn(0.001, 0.1)
    deadline.expect(1, is_first=True)
    clock.now_s += 0.4  # as long as a step
    deadline.read(1, 10)
    deadline.expect(2, is_first=False)
    assert deadline.seconds == pytest.approx(max(LEAST_S, FACTOR * (0.001 * 500 + 0.1)))


def test_a_long_text_takes_its_time_to_become_tokens(clock: Clock) -> None:
    deadline = StepDeadline(120, 500)
    deadline.learn(0.0001, 0.01)
    deadline.expect(1, is_first=True, chars=4_000_000)
    assert deadline.seconds == pytest.approx(LEAST_S + 20)
    deadline.read(1, 500)
    assert deadline.seconds == pytest.approx(LEAST_S)
