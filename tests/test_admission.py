"""Who joins and who leaves, decided by one and heard by all: model-checked against ranks that only listen."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moectl.admission import Admission, held_tokens

ROWS = 3
CANCELS = 2
BUDGET = 100


def make() -> Admission:
    return Admission(max_rows=ROWS, kv_tokens=BUDGET, max_cancels=CANCELS)


def test_rows_are_counted_as_long_as_the_longest() -> None:
    assert held_tokens([10, 40, 20]) == 120
    assert held_tokens([]) == 0


def test_no_more_than_the_rows_are_admitted() -> None:
    admission = make()
    for number in range(1, 6):
        admission.arrive(number, 10)
    assert admission.make_word() == (3, [])
    assert admission.make_word() == (3, [])
    admission.end(2)
    assert admission.make_word() == (4, [])
    assert admission.waiting == 1


def test_memory_holds_back_and_nobody_overtakes() -> None:
    admission = make()
    admission.arrive(1, 40)
    admission.arrive(2, 60)  # two rows of 60 are more than 100
    admission.arrive(3, 10)
    assert admission.make_word() == (1, [])
    admission.end(1)
    assert admission.make_word() == (2, [])
    admission.end(2)
    assert admission.make_word() == (3, [])


def test_a_refused_request_takes_no_row() -> None:
    admission = make()
    for number, reach in enumerate((10, 0, 0, 10, 10), 1):
        admission.arrive(number, reach)
    assert admission.make_word() == (5, [])


def test_a_cancelled_wait_is_over_at_once_and_passed_by_once_said() -> None:
    admission = make()
    for number in range(1, 7):
        admission.arrive(number, 10)
    assert admission.make_word() == (3, [])
    assert [admission.cancel(number) for number in (4, 5, 6)] == [True] * 3
    assert not admission.cancel(4)
    assert admission.make_word() == (5, [4, 5])  # 6 has to be said first
    assert admission.make_word() == (6, [6])


def test_running_requests_are_cancelled_before_waiting_ones() -> None:
    admission = make()
    for number in range(1, 6):
        admission.arrive(number, 10)
    admission.make_word()
    for number in (5, 4, 3, 2):
        admission.cancel(number)
    assert admission.make_word() == (3, [3, 2])
    assert admission.make_word() == (5, [5, 4])


@pytest.mark.parametrize("number", [1, 99])
def test_cancels_of_what_has_ended_or_never_comes_are_not_said(number: int) -> None:
    admission = make()
    admission.arrive(1, 10)
    admission.make_word()
    admission.end(1)
    assert not admission.cancel(number)
    assert admission.make_word() == (1, [])


def test_a_cancel_may_come_before_its_request() -> None:
    admission = make()
    assert not admission.cancel(1)
    assert admission.arrive(1, 10)
    assert admission.make_word() == (1, [1])


class Rank:
    """What a rank makes of the words it hears."""

    def __init__(self) -> None:
        self.admitted = 0
        self.withdrawn: set[int] = set()
        self.running: list[int] = []

    def come_to(self, number: int, refused: set[int]) -> None:
        self.admitted = number
        if number in self.withdrawn:
            self.withdrawn.remove(number)
        elif number not in refused:
            self.running.append(number)

    def hear(self, admit: int, cancels: list[int], refused: set[int]) -> None:
        for cancel in cancels:
            if cancel > self.admitted:
                self.withdrawn.add(cancel)
            elif cancel in self.running:
                self.running.remove(cancel)
        while self.admitted < admit:
            self.come_to(self.admitted + 1, refused)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 25))
def test_a_listener_agrees_however_wishes_fall(seed: int, requests: int) -> None:
    """Words are heard two steps late; when nothing runs and all is heard, the next is admitted without a word."""
    choose = random.Random(seed)
    admission, rank = make(), Rank()
    said: deque[tuple[int, list[int]]] = deque()
    arrived, refused, over = 0, set[int](), set[int]()
    reaches: dict[int, int] = {}
    for _ in range(40 * requests):
        if arrived < requests and choose.random() < 0.5:
            arrived += 1
            reaches[arrived] = choose.choice([0, 10, 30, 50, 90])
            if reaches[arrived] == 0:
                refused.add(arrived)
            if admission.arrive(arrived, reaches[arrived]):
                over.add(arrived)
        if choose.random() < 0.3:
            wish = choose.randint(1, requests)
            if admission.cancel(wish):
                over.add(wish)
        if not rank.running and not said:
            if rank.admitted < arrived:
                admission.admit(rank.admitted + 1)
                rank.come_to(rank.admitted + 1, refused)
            continue
        said.append(admission.make_word())
        if len(said) == 2 or not rank.running:
            before = set(rank.running)
            admit, cancels = said.popleft()
            rank.hear(admit, cancels, refused)
            for gone in before - set(rank.running):
                admission.end(gone)
                over.add(gone)
        if rank.running and choose.random() < 0.3:
            ended = choose.choice(rank.running)
            rank.running.remove(ended)
            admission.end(ended)
            over.add(ended)
        assert len(rank.running) <= ROWS
        assert held_tokens([reaches[r] for r in rank.running]) <= BUDGET
    for _ in range(10 * requests):  # let everything end
        for number in list(rank.running):
            rank.running.remove(number)
            admission.end(number)
            over.add(number)
        if said:
            rank.hear(*said.popleft(), refused)
        elif not rank.running and rank.admitted < arrived:
            admission.admit(rank.admitted + 1)
            rank.come_to(rank.admitted + 1, refused)
        else:
            said.append(admission.make_word())
    assert rank.admitted == arrived
    assert over | refused == set(range(1, arrived + 1))
