"""The models of one server, of which one at a time is loaded: a request for another one switches.

Whoever asks for a model that is not loaded waits; so do all who come after that, also for the model that is loaded.
When the answers in progress have ended it is unloaded, and the other one is loaded once for all who wait for it.
A `Controller` has the model that is loaded; `menu` knows the names.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from moectl.engine.protocol import Done, Ready, Token
from moectl.engine.request import Request
from moectl.errors import MoectlError, StateError, unexpected
from moectl.server.contracts import AnswerEvents, Health, Listed, Notice
from moectl.server.controller import MAX_WAITING, Controller, KeepAlive, refuse_full, refuse_too_long
from moectl.server.menu import PIN_FLAG, Menu, Offered
from moectl.server.metrics import Throughput
from moectl.session.session import Session
from moectl.session.target import Target
from moectl.text import count_text, size_text

TELL_S = 2.0  # from one word about a load to the next

# (target, on_made, kv_tokens): as `open_session`
OpenSession = Callable[[Target, Callable[[Session], None], int | None], AbstractContextManager[Session]]


class ServedModel:
    """One of them; a `contracts.Cluster`."""

    def __init__(
        self, offer: Offered, submit: Callable[[ServedModel, Request], Coroutine[Any, Any, AnswerEvents]]
    ) -> None:
        self.offer = offer
        self.name = offer.name
        self.created = int(time.time())
        self.model: Ready = offer.model
        self.kv_tokens: int | None = None  # the room that its first start found: what fitted once fits again
        self._submit = submit

    async def submit(self, request: Request) -> AnswerEvents:
        """Accept a request; see `contracts.Cluster.submit`."""
        return await self._submit(self, request)


class WaitingAnswer:
    """One request's events from the time before its model is loaded; see `contracts.AnswerEvents`."""

    def __init__(self, served: ServedModel, request: Request, give_up: Callable[[WaitingAnswer], None]) -> None:
        self.served = served
        self.request = request
        self._give_up = give_up
        self._inbox: asyncio.Queue[Notice | MoectlError | AnswerEvents] = asyncio.Queue()
        self._answer: AnswerEvents | None = None

    async def __aiter__(self) -> AsyncIterator[Token | Done | Notice]:
        while isinstance(item := await self._inbox.get(), Notice):
            yield item
        if isinstance(item, MoectlError):
            raise item
        async for event in item:
            yield event

    def cancel(self) -> None:
        """Stop soon."""
        if self._answer is None:
            self._give_up(self)
        else:
            self._answer.cancel()

    def tell(self, text: str) -> None:
        """Tell the client some news."""
        self._inbox.put_nowait(Notice(text))

    def begin(self, answer: AnswerEvents) -> None:
        """Go on with the events of the model that is loaded by now."""
        self._answer = answer
        self._inbox.put_nowait(answer)

    def fail(self, error: MoectlError) -> None:
        """End with an error."""
        self._inbox.put_nowait(error)


@dataclass(slots=True)
class _Loaded:
    served: ServedModel
    controller: Controller
    opened: ExitStack  # around its first session
    watch: asyncio.Task[None]


class ServedModels:
    """A server's models; lives in one event loop, opens and closes sessions in threads."""

    def __init__(
        self,
        menu: Menu,
        open_: OpenSession,
        make_controller: Callable[[Offered, Session], Controller],
        *,
        keep_alive: KeepAlive,
        stays: bool = True,
        pin: Offered | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take how to open a session, and how to make its controller.

        With `stays`, an idle model is unloaded and the server stays; without, it is over. `pin` is the model that no
        request unloads.
        """
        self.failure: MoectlError | None = None
        self.menu = menu
        self._open = open_
        self._make_controller = make_controller
        self._keep_alive = keep_alive
        self._stays = stays
        self._pin = pin
        self._say_to_owner = say
        self._all = {offer.name: ServedModel(offer, self._submit) for offer in menu.offers}
        self._loaded: _Loaded | None = None
        self._loading: ServedModel | None = None
        self._starting: Session | None = None  # of the model that is being loaded
        self._waiting: list[WaitingAnswer] = []  # in the order in which they came
        self._changed = asyncio.Event()  # who waits
        self._work: asyncio.Task[None] | None = None
        self._closed = False
        self._shut = threading.Event()  # the session is to end for good
        self._over = asyncio.Event()
        self._throughput = Throughput(time.monotonic())
        self._restarts = 0  # of models that are unloaded

    # What clients see: `contracts.Models`.

    @property
    def loaded_name(self) -> str | None:
        return self._loaded.served.name if self._loaded else None

    def find(self, name: str | None) -> ServedModel:
        return self._all[self.menu.find(name, self._loaded_offer).name]

    def listed(self) -> list[Listed]:
        loaded = self._loaded_offer
        return [self._list(served, loaded) for served in self._all.values()]

    def _list(self, served: ServedModel, loaded: Offered | None) -> Listed:
        offer = served.offer
        return Listed(
            served.name,
            served.created,
            served.model,
            loaded=offer is loaded,
            aliases=self.menu.aliases_of(offer, loaded),
            set_name=offer.target.name,
            quantization=offer.quantization,
            bytes=offer.bytes,
            demo=offer.demo,
            pinned=offer is self._pin,
        )

    @property
    def _loaded_offer(self) -> Offered | None:
        return self._loaded.served.offer if self._loaded else None

    def health(self) -> Health:
        waiting = len(self._waiting)
        if self._loaded is None:
            return Health(0, 0, 0.0, 0, waiting, (), self._restarts)
        health = self._loaded.controller.health()
        return replace(health, queued=health.queued + waiting, restarts=health.restarts + self._restarts)

    async def _submit(self, served: ServedModel, request: Request) -> AnswerEvents:
        loaded = self._loaded
        if self.failure is not None:
            raise self.failure
        if self._closed:
            raise _stopping()
        if loaded and loaded.served is served and not self._waiting and self._can_take(loaded.controller):
            return await loaded.controller.submit(request)
        if self._pin is not None and served.offer is not self._pin:
            raise StateError(
                f"{served.name} is not loaded, and {self._pin.name} stays loaded: it is pinned",
                hint=f"ask for {self._pin.name!r}, or start the server without {PIN_FLAG}",
            )
        refuse_too_long(request, served.model.max_seq_len)
        refuse_full(len(self._waiting), MAX_WAITING)
        answer = WaitingAnswer(served, request, self._give_up)
        self._waiting.append(answer)
        first = self._loading or self._waiting[0].served
        if first is not served:
            answer.tell(f"{served.name} waits: {first.name} comes first.")
        self._changed.set()
        self._go_to_work()
        return answer

    def _can_take(self, controller: Controller) -> bool:
        # One that closed itself because it was idle is about to be unloaded: who asks now, loads it again.
        return not (self._stays and controller.is_closed and controller.failure is None)

    def _give_up(self, answer: WaitingAnswer) -> None:
        if answer in self._waiting:
            self._waiting.remove(answer)
            answer.fail(StateError("the answer was cancelled before it began"))
            self._changed.set()

    # What the owner sees.

    @property
    def is_closed(self) -> bool:
        """Whether no more requests are accepted."""
        is_leaving = not self._stays and self._loaded is not None and self._loaded.controller.is_closed
        return self._closed or self.failure is not None or is_leaving

    @property
    def throughput(self) -> Throughput:
        """The tokens of the model that is loaded."""
        return self._loaded.controller.throughput if self._loaded else self._throughput

    @property
    def shown(self) -> ServedModel:
        """The model that is loaded, else the first one."""
        return self._loaded.served if self._loaded else self._all[self.menu.first.name]

    def close(self) -> None:
        """Accept no more requests, load no other model, and do not restart."""
        self._closed = True
        if self._loaded:
            self._loaded.controller.close()
        self._changed.set()

    async def wait_until_over(self) -> None:
        """Return when a model has failed for good, or when the only one was idle for its time and nothing stays."""
        await self._over.wait()

    async def end(self) -> None:
        """End the session, also one that starts; return when its workers are gone."""
        self.close()
        self._shut.set()
        if self._starting is not None:
            await asyncio.to_thread(self._starting.close)
        if self._work is not None:
            await asyncio.wait({self._work})
        await self._unload()

    # The work: one task at a time loads and unloads.

    def take(self, offer: Offered, session: Session, opened: ExitStack) -> None:
        """Take a session that has just started, and what is open around it."""
        served = self._all[offer.name]
        served.model = session.model
        served.kv_tokens = session.kv_tokens
        controller = self._make_controller(offer, session)
        watch = asyncio.create_task(self._watch(controller))
        self._loaded = _Loaded(served, controller, opened, watch)

    def _go_to_work(self) -> None:
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._do_work())

    async def _do_work(self) -> None:
        try:
            while await self._do_next():
                pass
        except Exception as error:  # who waits has to hear of it
            self._fail_waiting(unexpected(error))

    async def _do_next(self) -> bool:
        """Do what has to be done next; return whether there was anything."""
        loaded = self._loaded
        failure = self.failure or (loaded.controller.failure if loaded else None)
        if failure is not None or self._closed:
            self._fail_waiting(failure or _stopping())
            return False
        if loaded and loaded.controller.is_closed:  # it was idle
            self._say(f"{loaded.served.name} was idle and is unloaded; the next request for it loads it again.")
            await self._unload()
            return True
        if not self._waiting:
            return False
        served = self._waiting[0].served
        if loaded and loaded.served is served:
            await self._hand_over(loaded)
        elif loaded and not loaded.controller.idle.is_set():
            await self._wait_for_end(loaded, served)
        else:
            await self._unload()
            await self._load(served)
        return True

    async def _hand_over(self, loaded: _Loaded) -> None:
        for answer in [each for each in self._waiting if each.served is loaded.served]:
            self._waiting.remove(answer)
            try:
                answer.begin(await loaded.controller.submit(answer.request))
            except MoectlError as error:
                answer.fail(error)

    async def _wait_for_end(self, loaded: _Loaded, served: ServedModel) -> None:
        """Wait until the answers in progress have ended, or others wait."""
        left = count_text(loaded.controller.unfinished, "answer")
        self._tell(served, f"{served.name} is loaded when {left} of {loaded.served.name} came to the end.")
        self._changed.clear()
        waits = [asyncio.create_task(event.wait()) for event in (loaded.controller.idle, self._changed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _load(self, served: ServedModel) -> None:
        told = f"Loading {served.name}."
        self._say(told)
        self._tell(served, told)
        opened = ExitStack()
        self._loading = served
        opening = asyncio.ensure_future(asyncio.to_thread(self._start, served, opened))
        try:
            while not (await asyncio.wait({opening}, timeout=TELL_S))[0]:
                before, told = told, self._describe_load(served)
                if told != before:
                    self._tell(served, told)
            session = opening.result()
        except Exception as error:
            known = error if isinstance(error, MoectlError) else unexpected(error)
            self._say(f"{served.name} cannot be loaded: {known}")
            failure = StateError(f"{served.name} cannot be loaded: {known}", hint=known.hint)
            self._fail_waiting(_stopping() if self._shut.is_set() else failure, served)
            return
        finally:
            self._loading = self._starting = None
        self.take(served.offer, session, opened)
        self._keep_alive.renew()

    def _start(self, served: ServedModel, opened: ExitStack) -> Session:
        session = opened.enter_context(self._open(served.offer.target, self._note_start, served.kv_tokens))
        if self._shut.is_set():
            opened.close()
            raise _stopping()
        return session

    def _note_start(self, session: Session) -> None:
        self._starting = session
        if self._shut.is_set():
            session.close()

    def _describe_load(self, served: ServedModel) -> str:
        held = sum(self._starting.memory_bytes) if self._starting is not None else 0
        if not (held and served.offer.bytes):
            return f"Loading {served.name}."
        return (
            f"Loading {served.name}: {min(99, 100 * held // served.offer.bytes)} % of {size_text(served.offer.bytes)}."
        )

    async def _unload(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        loaded.watch.cancel()
        loaded.controller.close()
        # In threads: one that is stuck in sending to a frozen worker would keep the loop.
        await asyncio.to_thread(loaded.controller.end_session)
        await asyncio.to_thread(loaded.opened.close)
        self._restarts += loaded.controller.health().restarts
        self._throughput = Throughput(time.monotonic())

    async def _watch(self, controller: Controller) -> None:
        """Note the end of a controller that ends by itself: it failed, or was idle for long enough."""
        await controller.wait_until_over()
        self.failure = controller.failure
        if self.failure is not None or not self._stays:
            self._fail_waiting(self.failure or _stopping())
            self._over.set()
        else:
            self._go_to_work()

    def _fail_waiting(self, error: MoectlError, served: ServedModel | None = None) -> None:
        failed = [answer for answer in self._waiting if served in (None, answer.served)]
        self._waiting = [answer for answer in self._waiting if answer not in failed]
        for answer in failed:
            answer.fail(error)

    def _tell(self, served: ServedModel, text: str) -> None:
        for answer in self._waiting:
            if answer.served is served:
                answer.tell(text)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone; answers go on
            self._say_to_owner(text)


def _stopping() -> StateError:
    return StateError("moectl is stopping", hint="ask again: that starts it again")
