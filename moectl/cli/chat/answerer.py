"""The chat's questions, answered by a controller: messages and settings become the fields of an API request.

The controller may end in a long pause: every question looks for it again.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moectl.cli.chat.chat import Finished
from moectl.engine.protocol import Done
from moectl.server.contracts import Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from moectl.cli.chat.settings import ChatSettings
    from moectl.cli.chat.transcript import Message
    from moectl.server.client import Client


@dataclass(frozen=True, slots=True)
class ControllerAnswerer:
    """A `chat.Answerer` over what `connect` returns."""

    model: str
    connect: Callable[[], Client]
    details: Sequence[tuple[str, str]] = field(default=())
    over: bool = False  # a controller that fails is replaced at the next question
    say: Callable[[str], None] = lambda text: None  # what a person should know while the answer waits

    def chat(self, messages: Sequence[Message], settings: ChatSettings) -> Generator[str | Finished, None, None]:
        """Yield an answer as it comes; see `chat.Answerer`."""
        said = [{"role": message.role, "content": message.content} for message in messages]
        # Closing the connection is the cancel.
        with contextlib.closing(self.connect().chat({**settings.api_fields(), "messages": said})) as events:
            for event in events:
                if isinstance(event, Notice):
                    self.say(f"\n[{event.text}]")
                else:
                    yield (Finished(event.finish_reason, event.stats) if isinstance(event, Done) else event)
