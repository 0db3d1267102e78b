"""One answer as every protocol tells it: a stream of parts in their order, the whole of them, and what it used.

Chat completions, Responses and Messages only write what is read here: none of them knows tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moectl.engine.protocol import Done, Token
from moectl.engine.request import Stats
from moectl.server.contracts import Thinking
from moectl.shards.chat.calls import CallPart

Part = Thinking | str | CallPart  # str: a piece of the answer's text


def read_parts(event: Token | Done) -> Iterator[Part]:
    """Yield what an event adds to its answer, in order; nothing where its text is held back.

    Text that comes after a call has begun belongs after that call's end.
    """
    if isinstance(event, Done):
        thinking, text, calls = event.rest_thinking, event.rest, event.rest_calls
    else:
        thinking, text, calls = event.thinking, event.text, event.calls
    if thinking:
        yield Thinking(thinking)
    if text:
        yield text
    yield from calls


@dataclass(slots=True)
class WholeCall:
    """One tool call of an answer; `arguments` is the text of a JSON object where it has `ended`, else it was cut."""

    id: str
    name: str
    arguments: str = ""
    ended: bool = False


@dataclass(slots=True)
class WholeAnswer:
    """The parts of one answer, put together."""

    text: str = ""
    thinking: str = ""
    calls: list[WholeCall] = field(default_factory=list)
    done: Done | None = None

    def take(self, event: Token | Done) -> None:
        """Add what an event brings."""
        for part in read_parts(event):
            self.add(part)
        if isinstance(event, Done):
            self.done = event

    def add(self, part: Part) -> None:
        """Add one part."""
        match part:
            case str():
                self.text += part
            case Thinking(text=text):
                self.thinking += text
            case CallPart():
                if part.index == len(self.calls):
                    self.calls.append(WholeCall(part.id, part.name))
                call = self.calls[part.index]
                call.arguments += part.arguments
                call.ended = part.ended


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a reply took; `cached` are some of the prompt's, `thinking` are some of the completion's."""

    prompt: int
    completion: int
    cached: int
    thinking: int


def sum_usage(stats: Iterable[Stats], n: int = 1) -> Usage:
    """Return the usage of a reply's answers in order, `n` of which share each prompt: it counts once."""
    each = list(stats)
    prompts = each[::n]
    return Usage(
        prompt=sum(s.prompt_tokens for s in prompts),
        completion=sum(s.completion_tokens for s in each),
        cached=sum(s.cached_tokens for s in prompts),
        thinking=sum(s.thinking_tokens for s in each),
    )
