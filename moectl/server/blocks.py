"""An answer put together: a list of blocks, which are thinking, text or calls.

Anthropic's blocks and the Responses API's items are these; a chat's message has the texts of each kind. It knows no
protocol's names.
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
class AnswerBlock:
    """One block and the text that it has so far: of a call, its arguments."""

    kind: str
    index: int
    call_id: str = ""
    name: str = ""  # of the tool
    is_whole: bool = False  # not cut or broken off; of a call: its arguments are a JSON object
    _pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, piece: str) -> None:
        """Add a piece of its text."""
        self._pieces.append(piece)


Step = tuple[str, AnswerBlock, str]  # BEGIN, MORE or END; the block; the piece of text that MORE adds


class Blocks:
    """The blocks of one answer, made from its events, one after the other."""

    def __init__(self) -> None:
        self.all: list[AnswerBlock] = []
        self.done: Done | None = None
        self._open: AnswerBlock | None = None
        self._after = ""  # text that came while a call was open

    def text(self, kind: str) -> str:
        """Return the text of all blocks of a kind."""
        return "".join(block.text for block in self.all if block.kind == kind)

    @property
    def calls(self) -> list[AnswerBlock]:
        """The blocks that are calls."""
        return [block for block in self.all if block.kind == CALL]

    def take(self, event: Token | Done) -> Iterator[Step]:
        """Note an event; yield what happens to the blocks."""
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
            yield from self._close(is_cut=event.finish_reason == "length")
            if self._after:  # behind a call that was broken off
                yield from self._add(TEXT, self._after)
                yield from self._close(is_cut=True)

    def _add(self, kind: str, piece: str) -> Iterator[Step]:
        if self._open is not None and self._open.kind == CALL:
            self._after += piece
            return
        if self._open is None or self._open.kind != kind:
            yield from self._begin(AnswerBlock(kind, len(self.all)))
        yield from self._more(piece)

    def _add_call(self, told: CallPart) -> Iterator[Step]:
        if told.id:
            yield from self._begin(AnswerBlock(CALL, len(self.all), told.id, told.name))
        yield from self._more(told.arguments)
        if told.ended and self._open is not None:
            self._open.is_whole = True
            yield from self._close()
            after, self._after = self._after, ""
            if after:
                yield from self._add(TEXT, after)

    def _begin(self, block: AnswerBlock) -> Iterator[Step]:
        yield from self._close()
        self.all.append(block)
        self._open = block
        yield BEGIN, block, ""

    def _more(self, piece: str) -> Iterator[Step]:
        if piece and self._open is not None:
            self._open.add(piece)
            yield MORE, self._open, piece

    def _close(self, *, is_cut: bool = False) -> Iterator[Step]:
        block, self._open = self._open, None
        if block is not None:
            block.is_whole |= block.kind != CALL and not is_cut
            yield END, block, ""
