"""Hold an answer to a form, on the leader only: which tokens may come next, by llguidance's grammars.

A vocabulary of 200,000 tokens takes seconds to read, so a thread beside the steps reads it, once, and makes each
request's matcher before that request is admitted.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from moectl.engine.schema import make_limits
from moectl.errors import BadField, MoectlError
from moectl.shards.chat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Matcher:
    """One answer's way through its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def take(self, token: int) -> None:
        """Go on with one more token of the answer. Raises MoectlError for one that may not come."""
        if not self._matcher.consume_token(token):
            raise MoectlError(f"an answer has left its form: {self._why()}")

    def find_allowed(self, size: int) -> mx.array:
        """Return for each of `size` tokens whether it may come next, as booleans; after the end only ends may.

        Raises BadField where a schema has become too complex for its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise BadField(f"the schema is too complex: {self._why()}", hint="change the schema")
        return mx.array(np.unpackbits(bits, count=size, bitorder="little").view(np.bool_))

    def _why(self) -> str:
        return " ".join(self._matcher.get_error().split())[:200]


@dataclass(frozen=True, slots=True)
class _Job:
    grammar: str
    answered: tuple[int, ...]
    done: Callable[[Matcher | MoectlError], None]


class Grammars:
    """Makes matchers in a thread of its own, which begins with the first one; for one model's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._vocabulary: LLTokenizer | None = None
        self._head = ""  # of each grammar
        self._last: tuple[str, LLMatcher] | None = None  # the choices of one call have the same grammar

    def make(self, grammar: str, answered: tuple[int, ...], done: Callable[[Matcher | MoectlError], None]) -> None:
        """Make a matcher that has taken the tokens `answered`; call `done` with it, or with an error, in the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="grammars", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(grammar, answered, done))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job.done(self._make(job))
            except MoectlError as error:
                job.done(error)
            except BaseException as error:  # also a panic of llguidance: the request ends, the thread goes on
                job.done(MoectlError(f"the grammar of an answer cannot be made: {type(error).__name__}"))

    def _make(self, job: _Job) -> Matcher:
        from llguidance import LLMatcher

        if self._last is None or self._last[0] != job.grammar:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            made = LLMatcher(self._vocabulary, self._head + job.grammar, log_level=0, limits=make_limits())
            if made.is_error():
                why = " ".join(made.get_error().split())[:200]
                raise BadField(f"the schema cannot be enforced: {why}", hint="change the schema")
            self._last = job.grammar, made
        matcher = self._last[1].deep_copy()
        if not matcher.consume_tokens(list(job.answered)):
            raise MoectlError("the answer so far does not have its form: it cannot be resumed")
        return Matcher(matcher)

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer, size = self._tokenizer, self._vocab_size
        ends = sorted(end for end in tokenizer.eos_token_ids if end < size)
        if not ends:
            raise BadField("an answer of this model cannot be held to a form: none of its tokens ends an answer")
        try:
            return LLTokenizer(_fill_gaps(tokenizer.json), n_vocab=size, eos_token=ends)
        except ValueError:  # llguidance knows byte-level and byte-fallback vocabularies; of others, the text is told
            # Else it would ask for the tokens of what has to come, and such a tokenizer may have none for a part of it.
            self._head = '%llguidance {"no_forcing": true}\n'
            return LLTokenizer(TokenizerWrapper(_Told(tokenizer, size, ends[0])), n_vocab=size, eos_token=ends)


def _fill_gaps(text: str) -> str:
    """Return a tokenizer.json in which every number has a token: llguidance leaves out as many as there are gaps.

    What fills a gap is special, so no form allows it.
    """
    told = json.loads(text)
    vocabulary, added = told["model"].get("vocab"), told["added_tokens"]
    if not isinstance(vocabulary, dict):
        return text
    known = {*vocabulary.values(), *(token["id"] for token in added)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number in sorted(set(range(max(known))) - known):
        name = f"<|moectl gap {number}|>"
        vocabulary[name] = number
        added.append({"id": number, "content": name, "special": True, **flags})
    added.sort(key=itemgetter("id"))
    return json.dumps(told)


class _Told:
    """A vocabulary in the form that llguidance's TokenizerWrapper takes."""

    def __init__(self, tokenizer: Tokenizer, size: int, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids = [number for number in tokenizer.added if number < size]
        self.tokens = [tokenizer.tell(number).encode() for number in range(size)]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode())
