"""An answer as a list of parts, as Anthropic's blocks and the Responses API's items have it: thinking, text, calls.

It knows the engine's events and no protocol's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moectl.engine.protocol import Done, Token

THINKING, TEXT, CALL = "thinking", "text", "call"
BEGIN, MORE, END = "begin", "more", "end"


@dataclass(slots=True)
class Part:
    """One part and the text that it has so far: of a call, its arguments."""

    kind: str
    index: int
    call_id: str = ""
    name: str = ""  # of the tool
    is_whole: bool = False  # not cut by the answer's limit or by an error
    _pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, piece: str) -> None:
        """Add a piece of its text."""
        self._pieces.append(piece)


Step = tuple[str, Part, str]  # BEGIN, MORE or END; the part; the piece of text that MORE adds


class Parts:
    """The parts of one answer, made from its events."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self.done: Done | None = None
        self._open: Part | None = None

    def take(self, event: Token | Done) -> Iterator[Step]:
        """Note an event; yield what happens to the parts."""
        if isinstance(event, Done):
            self.done = event
            yield from self._add(THINKING, event.rest_thinking)
            yield from self._add(TEXT, event.rest)
            yield from self._close(is_cut=event.finish_reason == "length")
        else:
            yield from self._add(THINKING, event.thinking)
            yield from self._add(TEXT, event.text)

    def _add(self, kind: str, piece: str) -> Iterator[Step]:
        if not piece:
            return
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Part(kind, len(self.all)))
        assert self._open is not None
        self._open.add(piece)
        yield MORE, self._open, piece

    def _begin(self, part: Part) -> Iterator[Step]:
        yield from self._close()
        self.all.append(part)
        self._open = part
        yield BEGIN, part, ""

    def _close(self, *, is_cut: bool = False) -> Iterator[Step]:
        part, self._open = self._open, None
        if part is not None:
            part.is_whole = not is_cut
            yield END, part, ""
