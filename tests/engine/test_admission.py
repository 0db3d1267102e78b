"""Who joins and who leaves, decided by one and heard by all: model-checked against ranks that only listen."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings, strategies as st

from moectl.engine.admission import Admission, held_tokens

ROWS = 3
CANCELS = 2
BUDGET = 100


def make() -> Admission:
    return Admission(max_rows=ROWS, kv_tokens=BUDGET, max_cancels=CANCELS)


def test_rows_are_counted_as_long_as_the_longest() -> None:
    assert held_tokens([10, 40, 20]) == 120
    assert held_tokens([]) == 0
    assert held_tokens([10, 40, 20], 5) == 135


def test_what_a_row_takes_whatever_its_length_counts_beside_others_and_never_alone() -> None:
    admission = Admission(max_rows=ROWS, kv_tokens=100, max_cancels=CANCELS, row_tokens=30)
    for request_id, reach in ((1, 100), (2, 20), (3, 20), (4, 20)):
        admission.arrive(request_id, reach)
    assert admission.make_word() == (1, [])
    admission.end(1)
    assert admission.make_word() == (3, [])


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


class World:
    """A leader, a rank that listens two steps late, and chance; an idle rank admits the next without a word."""

    def __init__(self, seed: int, requests: int) -> None:
        self.choose = random.Random(seed)
        self.requests = requests
        self.admission, self.rank = make(), Rank()
        self.said: deque[tuple[int, list[int]]] = deque()
        self.reaches: dict[int, int] = {}
        self.over: set[int] = set()

    @property
    def refused(self) -> set[int]:
        return {number for number, reach in self.reaches.items() if reach == 0}

    def order(self) -> None:
        if len(self.reaches) < self.requests and self.choose.random() < 0.5:
            number = len(self.reaches) + 1
            self.reaches[number] = self.choose.choice([0, 10, 30, 50, 90])
            if self.admission.arrive(number, self.reaches[number]):
                self.over.add(number)
        if self.choose.random() < 0.3:
            wish = self.choose.randint(1, self.requests)
            if self.admission.cancel(wish):
                self.over.add(wish)

    def step(self) -> None:
        if self.rank.running:
            self.said.append(self.admission.make_word())
            if len(self.said) == 2:
                self.hear()
        elif self.said:
            self.hear()
        elif self.rank.admitted < len(self.reaches):
            self.admission.admit(self.rank.admitted + 1)
            self.rank.come_to(self.rank.admitted + 1, self.refused)

    def hear(self) -> None:
        admit, cancels = self.said.popleft()
        before = set(self.rank.running)
        self.rank.hear(admit, cancels, self.refused)
        for number in range(1, admit + 1):
            self.admission.admit(number)
        for gone in before - set(self.rank.running):
            self.end(gone)

    def end(self, number: int) -> None:
        self.admission.end(number)
        self.over.add(number)

    def finish(self, number: int) -> None:
        self.rank.running.remove(number)
        self.end(number)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 25))
def test_a_listener_agrees_however_wishes_fall(seed: int, requests: int) -> None:
    world = World(seed, requests)
    for _ in range(40 * requests):
        world.order()
        world.step()
        if world.rank.running and world.choose.random() < 0.3:
            world.finish(world.choose.choice(world.rank.running))
        assert len(world.rank.running) <= ROWS
        assert held_tokens([world.reaches[r] for r in world.rank.running]) <= BUDGET
    while world.rank.running or world.said or world.rank.admitted < len(world.reaches):
        world.step()
        for number in list(world.rank.running):
            world.finish(number)
    assert world.over | world.refused == set(world.reaches)
