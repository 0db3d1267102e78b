"""An answer's thinking, kept apart from the answer: the markers around it, and a stream that parts an answer's text.

mlx-lm knows the markers of most models and finds them in text. Here a marker's tokens count as themselves only: the
same letters that come from other tokens are text. Blanks beside a marker belong to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from moectl.shards.chat.token_text import TextStream

Edges = dict[str, list[tuple[str, str]]]  # state → what is written on the way to another state, and that state

ANSWER, THINKING = "normal", "reasoning"  # mlx-lm's names
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
# gpt-oss writes a message for each channel; `analysis` is its thinking.
_CHANNELS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
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
_FIRST_SIGN = 0xD800  # half a surrogate pair: no decoded text has one


class Told(NamedTuple):
    """A piece of an answer's text, and of the thinking before it."""

    thinking: str
    text: str


NOTHING = Told("", "")


class Markers:
    """What leads from the answer to thinking and back; `names` are the texts that do."""

    def __init__(self, edges: Edges, first: str, added: Mapping[str, int]) -> None:
        from mlx_lm.generate import TextStateMachine

        self.names = tuple(dict.fromkeys(text for leads in edges.values() for text, _ in leads))
        self.openings = tuple(text for leads in edges.values() for text, state in leads if state == THINKING)
        self.first = first
        used = sorted((text for text in added if any(text in name for name in self.names)), key=len, reverse=True)
        self.signs = {added[text]: chr(_FIRST_SIGN + i) for i, text in enumerate(used)}
        self.texts = {ord(self.signs[added[text]]): text for text in used}
        tokens = re.compile("|".join(map(re.escape, used)) or "(?!)")
        signed = {
            state: [(tokens.sub(lambda found: self.signs[added[found[0]]], text), to) for text, to in leads]
            for state, leads in edges.items()
        }
        self.machine = TextStateMachine(signed)

    def are_opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends in the middle of thinking, so that the answer begins with it."""
        return prompt.rstrip().endswith(self.openings)


def find_markers(renderer: Any, template: str, added: Mapping[str, int], form: Mapping[str, Any]) -> Markers | None:
    """Return the markers of a model, None where it has none.

    `renderer` is mlx-lm's TokenizerWrapper, `added` the tokens that ordinary text does not have, `form` what mlx-lm
    knows of the messages in an answer.
    """
    edges: Edges = {}
    if "transitions" in form:
        edges = {state: list(leads) for state, leads in form["transitions"].items()}
    elif added.keys() >= set(_CHANNELS):
        edges = _CHANNEL_EDGES
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
    return Markers(edges, form.get("initial_state", ANSWER), added) if edges else None


class AnswerText:
    """One answer's text, token by token: parted where there are markers, else as the stream gives it."""

    def __init__(self, open_stream: Callable[[], TextStream], markers: Markers | None = None, prompt: str = "") -> None:
        self._open_stream = open_stream
        self._stream = open_stream()
        self._markers = markers
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

    def finish(self) -> Told:
        """Return what was held back, after the last token."""
        from mlx_lm.generate import TextStateMachine

        first = self._part(self._stream.finish())
        if self._markers is None:
            return first
        state = self._state[0]
        self._state, text, _ = TextStateMachine.flush(self._state)
        last = self._join([(state, text)])
        unclaimed, self._unclaimed = self._unclaimed or "", None
        return Told(first.thinking + last.thinking, first.text + last.text + unclaimed)

    def _part(self, text: str) -> Told:
        from mlx_lm.generate import TextStateMachine

        if self._markers is None:
            return Told("", text)
        self._state, pieces = TextStateMachine.split(self._state, text)
        return self._join(pieces)

    def _join(self, pieces: Sequence[tuple[str, str]]) -> Told:
        assert self._markers is not None
        thinking, answer = "", ""
        for number, (state, signed) in enumerate(pieces):
            text = signed.translate(self._markers.texts)  # a part of a marker that did not become one
            if number > 0:
                self._blank, self._held = True, ""
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
            else:
                answer += text
        return Told(thinking, answer)
