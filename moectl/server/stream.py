"""One answer as every protocol tells it: a stream of parts in their order, and what it used.

Chat completions, Responses and Messages only write what is read here; `blocks` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
