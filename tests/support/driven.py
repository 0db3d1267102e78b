"""One engine in this process, driven step by step: orders go in between its steps, and steps are counted."""

from __future__ import annotations

import gc
import queue
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from moectl.engine.engine import Engine
from moectl.engine.protocol import Cancel, Done, Event, Generate, Refused, Token
from moectl.engine.request import Request, Stats
from tests.support.words import ask_chat


def _text(event: Token | Done) -> str:
    return event.text if isinstance(event, Token) else event.rest


class Driven:
    """An engine that leads, its inbox, and everything it has told."""

    def __init__(
        self, parts: tuple[Any, Any], *, max_seq_len: int = 512, vocab_size: int | None = None, **options: Any
    ) -> None:
        model, tokenizer = parts
        self.tokenizer = tokenizer
        if vocab_size is None:
            vocab_size = model.args.vocab_size
        self.engine = Engine(model, tokenizer, vocab_size=vocab_size, max_seq_len=max_seq_len, **options)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.events: list[Event] = []
        self.steps = 0
        self.on_step: Callable[[], None] = lambda: None  # called before each, and may order
        self._asked = 0
        step = self.engine._generator.next

        def count() -> Any:
            self.steps += 1
            return step()

        self.engine._generator.next = count
        take = self.engine._step

        def before(inbox: Any) -> Iterator[Event]:
            self.on_step()
            return take(inbox)

        self.engine._step = before  # type: ignore[method-assign]

    def ask(self, prompt: str = "", max_tokens: int = 8, *, raw: bool = True, **more: Any) -> int:
        """Order an answer; return its id."""
        self._asked += 1
        self.inbox.put(Generate((Request if raw else ask_chat)(self._asked, prompt, max_tokens, **more)))
        return self._asked

    def cancel(self, number: int) -> None:
        self.inbox.put(Cancel(number))

    def run(self) -> list[Event]:
        """Serve until everything that was ordered is answered; return what was told meanwhile."""
        self.inbox.put(None)
        told = list(self.engine.serve(self.inbox))
        self.engine._closing = False  # so that it can be run again
        self.events += told
        return told

    def tokens(self, number: int) -> list[int]:
        return [e.token for e in self.events if isinstance(e, Token) and e.id == number]

    def text(self, number: int) -> str:
        return "".join(_text(e) for e in self.events if isinstance(e, Token | Done) and e.id == number)

    def reason(self, number: int) -> str:
        [reason] = [e.finish_reason for e in self.events if isinstance(e, Done) and e.id == number]
        return str(reason)

    def stats(self, number: int) -> Stats:
        [stats] = [e.stats for e in self.events if isinstance(e, Done) and e.id == number]
        return stats

    def refusal(self, number: int) -> str:
        [message] = [e.to_error().message for e in self.events if isinstance(e, Refused) and e.id == number]
        return message

    def held_bytes(self) -> int:
        """Return what MLX's arrays take once past answers are let go of."""
        self.engine._cache.shrink(0)
        gc.collect()  # engines of other tests are cycles
        mx.synchronize(self.engine._generator.stream)
        mx.clear_cache()
        return mx.get_active_memory()
