"""A `contracts.Cluster` without a model: each token is its number, and words of the prompt say what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import Request, Stats, too_long
from moectl.errors import PeerLost, QueueFull, StateError
from moectl.server.contracts import Health, Listed
from moectl.server.openai import no_such_model
from moectl.shards.chat.calls import CallPart

ENDS_AFTER = 20  # tokens, unless ignore_eos
THOUGHTS = 3
MODEL = Ready("hidden", 4, vocab_size=1000, max_seq_len=256, top_k=4)


class FakeAnswer:
    """Says "SEED:0 ", "SEED:1 ", … ; obeys the prompt's words refuse, lose, bug, unfinished, slow, endless, hushed.

    With the word ponder, the first THOUGHTS tokens are thinking. Offered tools, it says one token and calls each of
    them that it has to, or all. Its first stop text ends an answer of ENDS_AFTER tokens.
    """

    def __init__(self, cluster: FakeCluster, request: Request, text: str) -> None:
        self._cluster = cluster
        self._request = request
        self._text = text
        self._wish = asyncio.Event()
        self._length = 0  # characters told

    def cancel(self) -> None:
        self._wish.set()

    async def __aiter__(self) -> AsyncIterator[Token | Done]:
        self._cluster.running += 1
        try:
            async for event in self._events():
                yield event
        finally:
            self._cluster.running -= 1
            if self._wish.is_set():
                self._cluster.cancelled += 1

    async def _events(self) -> AsyncIterator[Token | Done]:
        request, said = self._request, 0
        if "refuse" in self._text:
            raise too_long("the prompt has 300 tokens, the model's context is 256", request.source)
        room = MODEL.max_seq_len - 7
        most = room if request.ignore_eos else min(ENDS_AFTER, room)
        if request.tools and request.messages is not None and request.messages[-1]["role"] != "tool":
            yield self._token(0)
            for event in _call(request):
                yield event
            yield self._done("tool_calls", 1)
            return
        while said < min(request.max_tokens, most) or "endless" in self._text:
            if await self._wait():
                yield self._done("cancelled", said)
                return
            yield (token := self._token(said))
            self._length += len(token.text)
            said += 1
            if said == 3 and "lose" in self._text:
                raise PeerLost("rank 1 was lost: connection reset", host="mac2", hint="moectl doctor")
            if said == 3 and "bug" in self._text:
                raise RuntimeError(f"secret of {self._text}")
        if "unfinished" not in self._text:
            yield self._done("length" if request.max_tokens <= most else "stop", said)

    async def _wait(self) -> bool:
        """Wait for a token's time; return whether somebody cancelled."""
        seconds = 0.3 if "slow" in self._text else 0.01 if "endless" in self._text else 0.0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wish.wait(), seconds) if seconds else await asyncio.sleep(0)
        return self._wish.is_set()

    def _token(self, number: int) -> Token:
        text = f"{self._request.seed or 0}:{number} "
        if "hushed" in self._text:
            text = ""
        if self._thinks(number):
            return Token(self._request.id, number, "", thinking=text)
        if self._request.logprobs is None:
            return Token(self._request.id, number, text)
        top = [(number + i, f"{self._request.seed or 0}:{number + i} ", -0.5 - i) for i in range(3)]
        top[2] = (999, "\ufffd", float("-inf"))
        return Token(self._request.id, number, text, -0.5, top[: max(1, self._request.logprobs)], self._length)

    def _thinks(self, number: int) -> bool:
        return "ponder" in self._text and number < THOUGHTS

    def _done(self, reason: str, said: int) -> Done:
        thoughts = sum(map(self._thinks, range(said)))
        stats = Stats(7, said, 0.1, 0.2, 0.1, 1000, cached_tokens=3, drafted_tokens=2, thinking_tokens=thoughts)
        stop = self._request.stop[0] if self._request.stop and reason == "stop" else None
        return Done(self._request.id, reason, stats, stop_text=stop)


def _call(request: Request) -> Iterator[Token]:
    for i, name in enumerate(request.must_call or request.tool_names):
        pieces = [
            CallPart(i, f"call_{i}", name),
            CallPart(i, arguments='{"a": '),
            CallPart(i, "", "", "2}", ended=True),
        ]
        for piece in pieces:
            yield Token(request.id, 1, "", calls=[piece])


class FakeCluster:
    """All models of a server, and the only one of them.

    It answers as FakeAnswer, and refuses to when the prompt says full or stopping.
    """

    name = "tiny"
    created = 1_700_000_000
    model = MODEL

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.running = 0
        self.cancelled = 0
        self.ranks_answered = 2
        self.progress_age_s = 0.0

    async def submit(self, request: Request) -> FakeAnswer:
        text = request.prompt + "".join(message["content"] for message in request.messages or ())
        if "full" in text:
            raise QueueFull("16 requests wait already", hint="ask again in 3 s", retry_after_s=2.5)
        if "stopping" in text:
            raise StateError("moectl is stopping", hint="moectl serve")
        self.requests.append(request)
        return FakeAnswer(self, request, text)

    @property
    def loaded_name(self) -> str:
        return self.name

    def find(self, name: str | None) -> FakeCluster:
        if name not in (None, "", self.name):
            raise no_such_model(name or "", self.name)
        return self

    def listed(self) -> list[Listed]:
        return [Listed(self.name, self.created, self.model)]

    def health(self) -> Health:
        return Health(2, self.ranks_answered, self.progress_age_s, self.running, 0, (1000, 2000), 1)
