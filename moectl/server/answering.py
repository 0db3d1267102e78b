"""One reply to an HTTP request: its choices' answers as they come, as a stream or as a whole, until all have ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Protocol

from starlette.types import Receive, Scope, Send

from moectl.engine.isolation import trace
from moectl.engine.protocol import Done, Token
from moectl.errors import MoectlError, UsageError
from moectl.server import replies
from moectl.server.contracts import NOTICE, AnswerEvents, Notice
from moectl.server.doors import write_json
from moectl.server.fields import Fields
from moectl.server.metrics import Metrics
from moectl.server.openai import ApiRequest

REPORT = "the server's log says more; report it"
_log = logging.getLogger("moectl.server")


def _explain(unknown: Exception) -> MoectlError:
    _log.error("an answer ends by a bug:\n%s", trace(unknown))
    return MoectlError(f"unexpected {type(unknown).__name__} (a bug in moectl)", hint=REPORT)


class _Gone(Exception):
    """The client has closed the connection."""


class AnyReply(Protocol):
    """One reply's JSON in the form of one protocol, made of the events of all its choices.

    Each piece of a stream is an object, or None for [DONE].
    """

    def start(self) -> Iterator[Fields | None]:
        """Yield with what a stream begins."""
        ...

    def take(self, index: int, event: Token | Done) -> Iterator[Fields | None]:
        """Note an event of a choice; yield its pieces of a stream."""
        ...

    def end(self) -> Iterator[Fields | None]:
        """Yield with what a stream ends once every choice is done."""
        ...

    def fail(self, error: MoectlError) -> Iterator[Fields | None]:
        """Yield with what a stream ends that an error breaks off."""
        ...

    def whole(self) -> Fields:
        """Return the whole reply, once every choice is done."""
        ...


_Entry = tuple[int, Token | Done | Notice]
_EVERY = -1  # in the place of a choice's index


class Answering:
    """One reply: the events of all its choices as they come, until they end or fail, or the client has gone."""

    def __init__(
        self,
        asked: ApiRequest,
        reply: AnyReply,
        answers: list[AnswerEvents],
        metrics: Metrics,
        silence_s: float,
    ) -> None:
        self._asked = asked
        self._reply = reply
        self._answers = answers
        self._metrics = metrics
        self._silence_s = silence_s
        self._inbox: asyncio.Queue[tuple[int, Token | Done | Notice | MoectlError | None]] = asyncio.Queue()
        self._open = set(range(len(answers)))
        self._gone = False
        self._said_s = time.monotonic()  # when the stream last carried data

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._pump(i, answer)) for i, answer in enumerate(self._answers)]
        tasks.append(asyncio.create_task(self._watch(receive)))
        try:
            await (self._stream if self._asked.stream else self._collect)(scope, receive, send)
        except _Gone:
            pass
        finally:
            self._cancel()
            for _ in self._open:
                self._metrics.count_end("cancelled")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, error: MoectlError) -> None:
        """Let the reply end with this error, soon."""
        self._inbox.put_nowait((_EVERY, error))

    def _cancel(self) -> None:
        for index in self._open:
            self._answers[index].cancel()

    async def _pump(self, index: int, answer: AnswerEvents) -> None:
        before = time.monotonic()
        first = True
        error: MoectlError
        try:
            async for event in answer:
                if isinstance(event, Token):
                    now = time.monotonic()
                    self._metrics.count_token(now - before, first=first)
                    before, first = now, False
                self._inbox.put_nowait((index, event))
                if isinstance(event, Done):
                    return
            error = MoectlError("the answer ended before it was done (a bug in moectl)", hint=REPORT)
        except MoectlError as known:
            error = known
        except Exception as unknown:
            error = _explain(unknown)
        self._inbox.put_nowait((index, error))

    def _give_up(self, unknown: Exception) -> MoectlError:
        self._cancel()
        for _ in self._open:
            self._metrics.count_end("failed")
        self._open.clear()
        return _explain(unknown)

    async def _watch(self, receive: Receive) -> None:
        # uvicorn lets us write to a client that has gone; only `receive` tells of it.
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()
        self._inbox.put_nowait((_EVERY, None))

    async def _next(self) -> _Entry | None:
        """Return the next (choice, event), or None when the stream is silent for too long; raise an answer's error.

        Many events bring the client no data, such as tokens whose text is held back.
        """
        try:
            async with asyncio.timeout(max(0.0, self._said_s + self._silence_s - time.monotonic())):
                index, event = await self._inbox.get()
        except TimeoutError:
            return None
        if self._gone or event is None:
            raise _Gone
        if isinstance(event, MoectlError):
            if index != _EVERY:
                self._open.remove(index)
                self._metrics.count_end("refused" if isinstance(event, UsageError) else "failed")
            raise event
        if isinstance(event, Done):
            self._open.remove(index)
            self._metrics.count_end(event.finish_reason, event.stats)
        return index, event

    async def _collect(self, scope: Scope, receive: Receive, send: Send) -> None:
        while self._open:
            entry = await self._next()
            if entry is None:
                self._said_s = time.monotonic()
            elif not isinstance(entry[1], Notice):
                for _ in self._reply.take(entry[0], entry[1]):
                    pass
        await write_json(self._reply.whole())(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A refusal comes before the first token: it may still have a status of its own.
        entry = await self._next()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._say_chunks(send, self._reply.start())
            await self._send_entry(send, entry)
            while self._open:
                await self._send_entry(send, await self._next())
            await self._say_chunks(send, self._reply.end())
        except MoectlError as error:
            await self._say_chunks(send, self._reply.fail(error))
        except _Gone:
            raise
        except Exception as unknown:  # too late for a status; without this the connection would only break
            await self._say_chunks(send, self._reply.fail(self._give_up(unknown)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_entry(self, send: Send, entry: _Entry | None) -> None:
        if entry is None:
            await self._say(send, b": still working\n\n")
        elif not isinstance(entry[1], Notice):
            await self._say_chunks(send, self._reply.take(entry[0], entry[1]))
        elif entry[0] == min(self._open):  # the same for all choices of a reply
            await self._say(send, f": {NOTICE}{' '.join(entry[1].text.split())}\n\n".encode())

    async def _say_chunks(self, send: Send, chunks: Iterator[Fields | None]) -> None:
        if body := b"".join(map(replies.encode_event, chunks)):
            await self._say(send, body)

    async def _say(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._said_s = time.monotonic()
