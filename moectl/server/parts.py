"""An answer as a list of parts, as Anthropic's blocks and the Responses API's items have it: thinking, text, calls.

It knows no protocol's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moectl.engine.protocol import Done, Token
from moectl.server.contracts import Thinking
from moectl.server.stream import read_parts
from moectl.shards.chat.calls import CallPart

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
    """The parts of one answer, made from its events, one after the other."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self.done: Done | None = None
        self._open: Part | None = None
        self._after = ""  # text that came while a call was open

    def take(self, event: Token | Done) -> Iterator[Step]:
        """Note an event; yield what happens to the parts."""
        for told in read_parts(event):
            match told:
                case CallPart():
                    yield from self._add_call(told)
                case Thinking(text=text):
                    yield from self._add(THINKING, text)
                case text:
                    yield from self._add(TEXT, text)
        if isinstance(event, Done):
            self.done = event
            yield from self._close(is_whole=event.finish_reason != "length")
            if self._after:  # behind a call that was broken off
                yield from self._add(TEXT, self._after)
                yield from self._close(is_whole=False)

    def _add(self, kind: str, piece: str) -> Iterator[Step]:
        if self._open is not None and self._open.kind == CALL:
            self._after += piece
            return
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Part(kind, len(self.all)))
        yield from self._more(piece)

    def _add_call(self, told: CallPart) -> Iterator[Step]:
        if told.id:
            yield from self._begin(Part(CALL, len(self.all), told.id, told.name))
        yield from self._more(told.arguments)
        if told.ended:
            yield from self._close()
            after, self._after = self._after, ""
            if after:
                yield from self._add(TEXT, after)

    def _begin(self, part: Part) -> Iterator[Step]:
        yield from self._close()
        self.all.append(part)
        self._open = part
        yield BEGIN, part, ""

    def _more(self, piece: str) -> Iterator[Step]:
        if piece and self._open is not None:
            self._open.add(piece)
            yield MORE, self._open, piece

    def _close(self, *, is_whole: bool = True) -> Iterator[Step]:
        part, self._open = self._open, None
        if part is not None:
            part.is_whole = is_whole
            yield END, part, ""
