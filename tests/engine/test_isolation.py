"""An error in one answer ends that answer alone: two real ranks, eight requests at once, one of them poisoned."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from moectl.engine.protocol import Done, Refused, RunOptions, Token
from moectl.engine.request import Request
from moectl.errors import MoectlError
from moectl.server.contracts import Notice
from moectl.server.controller import Controller, KeepAlive
from moectl.server.restarts import Restarts
from moectl.session.session import Session
from tests.engine.test_lockstep import cut_case
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.poisoned_worker import PLACES, seed_of
from tests.support.tiny import write_checkpoint

WORKER = (sys.executable, "-m", "tests.support.poisoned_worker")
BAD = 3  # which of the eight is poisoned
LENGTH = 24


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    return cut_case(source, tmp_path_factory.mktemp("shards") / "two", "hidden", (2, 4), 16)


@pytest.fixture(scope="module")
def session(shards: Path) -> Iterator[Session]:
    """One session for all: an error that ends it fails every test after it."""
    with Session(specs(shards, WORKER), RunOptions(prefill_step=16)) as session:
        yield session


def eight(first: int, seed: int, length: int = LENGTH) -> list[Request]:
    """Return eight requests, numbered from `first`, greedy and sampled; one of them has this seed."""
    requests = []
    for index in range(8):
        more: dict[str, Any] = {"temperature": 0.8, "seed": index} if index % 2 else {}
        if index == BAD:
            more = {"temperature": 0.8, "seed": seed, "frequency_penalty": 0.5, "logprobs": 2, "cache_prompt": False}
        requests.append(Request(first + index, f"{'prompt ' * (index + 1)}{index}", length, ignore_eos=True, **more))
    return requests


def serve(session: Session, requests: list[Request]) -> tuple[dict[int, list[int]], dict[int, Refused]]:
    """Hand in all at once; return tokens and errors by their place among them, once all have ended."""
    first = requests[0].id
    tokens: dict[int, list[int]] = {}
    refused: dict[int, Refused] = {}
    for request in requests:
        session.submit(request)
        tokens[request.id - first] = []
    left = len(requests)
    for event in session.events():
        index = event.id - first
        if isinstance(event, Token):
            tokens[index].append(event.token)
        if isinstance(event, Refused):
            assert index not in refused
            refused[index] = event
        left -= isinstance(event, Done | Refused)
        if not left:
            break
    return tokens, refused


class Count:
    """Request numbers of one session."""

    last = 0

    def take(self, seed: int) -> list[Request]:
        requests = eight(self.last + 1, seed)
        self.last += len(requests)
        return requests


@pytest.fixture(scope="module")
def count() -> Count:
    return Count()


@pytest.fixture(scope="module")
def clean(session: Session, count: Count) -> dict[int, list[int]]:
    tokens, refused = serve(session, count.take(1))
    assert not refused
    assert [len(row) for row in tokens.values()] == [LENGTH] * 8
    return tokens


@pytest.mark.parametrize("place", PLACES)
def test_an_error_ends_its_own_answer_only(place: str, session: Session, count: Count, clean: Any) -> None:
    tokens, refused = serve(session, count.take(seed_of(place)))
    assert list(refused) == [BAD]
    error = refused[BAD].to_error()
    assert type(error) is MoectlError
    assert "internal error in this request" in error.message
    assert "poison" in error.message
    bad = tokens.pop(BAD)
    assert len(bad) <= LENGTH
    assert tokens == {index: row for index, row in clean.items() if index != BAD}
    assert session.count_alive(60) == 2


def test_an_error_while_the_row_is_alone(session: Session, count: Count) -> None:
    for place in ("logits", "token sent"):
        count.last += 1
        _, refused = serve(session, [Request(count.last, "alone", LENGTH, seed=seed_of(place), logprobs=0)])
        assert list(refused) == [0]


def test_a_request_that_cannot_be_sent_is_no_rank_s_and_takes_no_number(shards: Path) -> None:
    unsendable = Request(0, "a", 4, cache_prompt=Fraction(1))  # type: ignore[arg-type]  # JSON has no fractions

    async def ask(controller: Controller) -> None:
        bad, good = await controller.submit(unsendable), await controller.submit(Request(0, "b", 4))
        with pytest.raises(MoectlError, match="TypeError"):
            await collect(bad)
        done = (await collect(good))[-1]
        assert isinstance(done, Done)
        assert done.stats.completion_tokens == 4

    control(shards, ask)


@pytest.mark.long
def test_a_poisoned_answer_is_not_replayed_after_a_restart(shards: Path) -> None:
    submitted: list[list[int | None]] = []  # seeds, by session

    class Spied(Session):
        def start(self) -> None:
            submitted.append([])
            super().start()

        def submit(self, request: Request) -> None:
            submitted[-1].append(request.seed)
            super().submit(request)

    async def ask(controller: Controller) -> None:
        answers = [await controller.submit(request) for request in eight(0, seed_of("detokenizer"), 150)]
        with pytest.raises(MoectlError, match="internal error in this request: TypeError: poison"):
            await collect(answers[BAD])
        assert controller.health().restarts == 0
        os.kill(controller._session._links[1].pid or 0, signal.SIGKILL)
        others = [await collect(answer) for index, answer in enumerate(answers) if index != BAD]
        assert all(len([e for e in events if isinstance(e, Token)]) == 150 for events in others)
        assert controller.health().restarts == 1

    control(shards, ask, Spied)
    assert len(submitted) == 2
    assert seed_of("detokenizer") in submitted[0]
    assert len(submitted[1]) == 7
    assert seed_of("detokenizer") not in submitted[1]


async def collect(answer: Any) -> list[Any]:
    return [event async for event in answer if not isinstance(event, Notice)]


def control(shards: Path, ask: Any, kind: type[Session] = Session) -> None:
    """Give `ask` a controller over sessions of poisoned workers."""

    @contextlib.contextmanager
    def reopen(patience: float, on_made: Callable[[Session], None]) -> Iterator[Session]:
        session = kind(specs(shards, WORKER), patience=patience)
        on_made(session)
        with session:
            yield session

    async def main() -> None:
        with kind(specs(shards, WORKER)) as first:
            controller = Controller(
                first, "model", ranks=2, keep_alive=KeepAlive(-1), open_=reopen, restarts=Restarts(3)
            )
            try:
                await asyncio.wait_for(ask(controller), 120)
            finally:
                await asyncio.to_thread(controller.end_session)

    asyncio.run(main())
