"""An answer's parts: the markers around its thinking and its tool calls, and a stream that parts an answer's text.

mlx-lm knows the markers of most models and finds them in text. Here a marker's tokens count as themselves only: the
same letters that come from other tokens are text. Blanks beside a marker belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from moectl.shards.chat.calls import CHANNELS, CallFormat, CallPart, CallReader

if TYPE_CHECKING:
    from moectl.shards.chat.token_text import TextStream

Edges = dict[str, list[tuple[str, str]]]  # state → what is written on the way to another state, and that state

ANSWER, THINKING, CALL = "normal", "reasoning", "tool"  # mlx-lm's names
_HEADER = "header"  # of a message: neither of both, told only where no message follows
# Pairs that mlx-lm does not know: Mistral's, Seed-OSS's, EXAONE Deep's, Apertus' and Command A's.
_MORE = (
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_AROUND_ANSWER = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")  # Command A's
_AS_TEXT = (("<think>", "</think>"), *_MORE)  # that a template may name although they are not tokens
# Of gpt-oss's channels, `analysis` is its thinking.
_CHANNEL_EDGES: Edges = {
    ANSWER: [
        ("<|channel|>analysis<|message|>", THINKING),
        ("<|channel|>final<|message|>", ANSWER),
        ("<|channel|>commentary<|message|>", ANSWER),
        ("<|start|>assistant", ANSWER),
        ("<|end|>", ANSWER),
    ],
    THINKING: [("<|end|>", ANSWER), ("<|start|>assistant", ANSWER), ("<|channel|>final<|message|>", ANSWER)],
}
# The same where it may call functions. One is the recipient of a message, which is named before or after the channel.
_TO_CHANNELS = [
    ("<|channel|>analysis<|message|>", THINKING),
    ("<|channel|>final<|message|>", ANSWER),
    ("<|channel|>commentary<|message|>", ANSWER),
    ("<|channel|>commentary to=", CALL),
    ("<|channel|>analysis to=", CALL),
]
_CALL_CHANNEL_EDGES: Edges = {
    ANSWER: [*_TO_CHANNELS, ("<|start|>assistant", _HEADER), ("<|end|>", ANSWER)],
    THINKING: [*_TO_CHANNELS[1:], ("<|end|>", ANSWER), ("<|start|>assistant", _HEADER)],
    _HEADER: [*_TO_CHANNELS, (" to=", CALL)],
    CALL: [("<|call|>", ANSWER), ("<|end|>", ANSWER), ("<|start|>assistant", _HEADER)],
}
_FIRST_SIGN = 0xD800  # half a surrogate pair: no decoded text has one


class Told(NamedTuple):
    """A piece of an answer's text, of the thinking before it, and of the calls after it."""

    thinking: str
    text: str
    calls: tuple[CallPart, ...] = ()


NOTHING = Told("", "")


class Markers:
    """What leads from the answer to thinking and back; `names` are the texts that do."""

    def __init__(self, edges: Edges, first: str, added: Mapping[str, int]) -> None:
        from mlx_lm.generate import TextStateMachine

        self.names = tuple(dict.fromkeys(text for leads in edges.values() for text, _ in leads))
        self.openings = tuple(text for leads in edges.values() for text, state in leads if state == THINKING)
        self.edges = edges
        self.first = first
        used = sorted((text for text in added if any(text in name for name in self.names)), key=len, reverse=True)
        self.signs = {added[text]: chr(_FIRST_SIGN + i) for i, text in enumerate(used)}
        self.texts = {ord(self.signs[added[text]]): text for text in used}
        self.tokens = {text: added[text] for text in used}  # that are, or are part of, one of the names
        tokens = re.compile("|".join(map(re.escape, used)) or "(?!)")
        signed = {
            state: [(tokens.sub(lambda found: self.signs[added[found[0]]], text), to) for text, to in leads]
            for state, leads in edges.items()
        }
        self.machine = TextStateMachine(signed)

    @property
    def has_channels(self) -> bool:
        """Whether these are gpt-oss's."""
        return "<|channel|>final<|message|>" in self.names

    def are_opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends in the middle of thinking, so that the answer begins with it."""
        return prompt.rstrip().endswith(self.openings)


def find_markers(
    renderer: Any, template: str, added: Mapping[str, int], form: Mapping[str, Any], calls: CallFormat | None = None
) -> Markers | None:
    """Return the markers of a model, None where it has none.

    `renderer` is mlx-lm's TokenizerWrapper, `added` the tokens that ordinary text does not have, `form` what mlx-lm
    knows of the messages in an answer, `calls` how it writes tool calls where it may.
    """
    edges: Edges = {}
    first = form.get("initial_state", ANSWER)
    if "transitions" in form:
        edges = {state: list(leads) for state, leads in form["transitions"].items()}
    elif added.keys() >= CHANNELS:
        edges, first = (_CHANNEL_EDGES, first) if calls is None else (_CALL_CHANNEL_EDGES, _HEADER)
    else:
        # Some vocabularies have a marker as one of their ordinary tokens.
        ids = {renderer.think_start: renderer.think_start_tokens, renderer.think_end: renderer.think_end_tokens}
        added = {text: tokens[0] for text, tokens in ids.items() if tokens and len(tokens) == 1} | dict(added)
        named = [pair for pair in _AS_TEXT if all(marker in template for marker in pair)]
        pairs = [(renderer.think_start, renderer.think_end)] * renderer.has_thinking
        pairs += [pair for pair in _MORE if added.keys() >= set(pair)]
        # A vocabulary may have markers that the model does not use.
        for start, end in [*(pair for pair in pairs if pair in named), *pairs, *named][:1]:
            around = [marker for marker in _AROUND_ANSWER if marker in added] + list(renderer.structural_markers)
            edges = {
                ANSWER: [(start, THINKING), *((marker, ANSWER) for marker in around)],
                THINKING: [(end, ANSWER), (start, THINKING)],  # a model may begin again what its prompt has begun
            }
    if calls is not None and CALL not in edges:
        edges = _add_calls(edges, calls)
    return Markers(edges, first, added) if edges else None


def _add_calls(edges: Edges, calls: CallFormat) -> Edges:
    added = {state: list(leads) for state, leads in {ANSWER: [], **edges}.items()}
    if not any(to == CALL for leads in edges.values() for _, to in leads):
        for state in (ANSWER, THINKING):
            if state in added:
                added[state].append((calls.start, CALL))
    return {**added, CALL: [(calls.end, ANSWER)] if calls.end else []}


class AnswerText:
    """One answer's text, token by token: parted where there are markers, else as the stream gives it."""

    def __init__(
        self,
        open_stream: Callable[[], TextStream],
        markers: Markers | None = None,
        prompt: str = "",
        calls: CallReader | None = None,
    ) -> None:
        self._open_stream = open_stream
        self._stream = open_stream()
        self._markers = markers
        self._calls = calls  # None: there are none, and their markers are text
        self._later = ""  # text that came in one token with the end of a call: it is told with the next
        self._blank = False  # whether blanks are dropped, because a marker was the last
        self._held = ""  # blanks at the end of the thinking: dropped before a marker
        self._unclaimed: str | None = None  # of headers, while no message has come
        if markers is not None:
            self._blank = markers.are_opened_by(prompt)
            self._state = markers.machine.make_state(THINKING if self._blank else markers.first)
            self._unclaimed = "" if self._state[0] == _HEADER else None

    @property
    def is_thinking(self) -> bool:
        """Whether the next token belongs to the thinking, unless it is a marker."""
        return self._markers is not None and self._state[0] == THINKING

    def feed(self, token: int) -> Told:
        """Return what becomes final with one more token."""
        sign = None if self._markers is None else self._markers.signs.get(token)
        if sign is None:
            return self._part(self._stream.feed(token))
        text = self._stream.finish() + sign
        self._stream = self._open_stream()
        return self._part(text)

    def finish(self, *, by_itself: bool = False) -> Told:
        """Return what was held back, after the last token; the model may have ended its answer by itself.

        A call that was cut is text.
        """
        from mlx_lm.generate import TextStateMachine

        first = self._part(self._stream.finish())
        if self._markers is None:
            return first
        state = self._state[0]
        self._state, text, _ = TextStateMachine.flush(self._state)
        last = self._join([(state, text)])
        unclaimed, self._unclaimed = self._unclaimed or "", None
        calls, rest = ([], "") if self._calls is None else self._calls.finish(by_itself=by_itself)
        later, self._later = self._later, ""
        return Told(
            first.thinking + last.thinking,
            first.text + last.text + later + unclaimed + rest,
            (*first.calls, *last.calls, *calls),
        )

    def _part(self, text: str) -> Told:
        from mlx_lm.generate import TextStateMachine

        if self._markers is None:
            return Told("", text)
        self._state, pieces = TextStateMachine.split(self._state, text)
        return self._join(pieces)

    def _join(self, pieces: Sequence[tuple[str, str]]) -> Told:
        assert self._markers is not None
        thinking, answer = "", self._later
        self._later = ""
        told: list[CallPart] = []
        for number, (state, signed) in enumerate(pieces):
            text = signed.translate(self._markers.texts)  # a part of a marker that did not become one
            if number > 0:
                if self._calls is not None and pieces[number - 1][0] == CALL:
                    calls, rest = self._calls.close()
                    told += calls
                    answer += rest
                self._blank, self._held = True, ""
            if state == CALL and self._calls is not None:
                self._unclaimed = None
                told += self._calls.feed(text)
                continue
            if state == _HEADER:
                self._unclaimed = None if self._unclaimed is None else self._unclaimed + text
                continue
            self._unclaimed = None
            if self._blank:
                text = text.lstrip()
                self._blank = not text
            if state == THINKING:
                text = self._held + text
                self._held = text[len(text.rstrip()) :]
                thinking += text.rstrip()
            elif told:
                self._later += text
            else:
                answer += text
        return Told(thinking, answer, tuple(told))
