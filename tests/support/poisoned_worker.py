"""A worker in which some requests meet an error, known by their seed: `python -m tests.support.poisoned_worker`.

The errors are put where an answer is read, sampled, detokenised and told, each at the place that its name says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moectl.engine import answer as answer_module, controller_link, worker
from moectl.engine.answer import Answer
from moectl.engine.protocol import Done, Prefilled, Token
from moectl.engine.sampling import Sampler

PLACES = (
    "prompt",
    "sampler made",
    "detokenizer made",
    "first logits",
    "logits",
    "first sample",
    "sample",
    "detokenizer",
    "panic",
    "end of text",
    "odds",
    "progress sent",
    "token sent",
    "end sent",
)
FIRST_SEED = 6660
AFTER = 3  # tokens


class Panic(BaseException):
    """As PyO3 raises where Rust code panics: no Exception."""


def seed_of(place: str) -> int:
    return FIRST_SEED + PLACES.index(place)


def is_poisoned(request: Any, *places: str) -> bool:
    return request.seed in map(seed_of, places)


def fail_where(owner: Any, name: str, is_bad: Callable[..., bool], error: BaseException | None = None) -> None:
    """Make a function raise where `is_bad` says so of its arguments."""
    real = getattr(owner, name)

    def poisoned(*words: Any, **more: Any) -> Any:
        if is_bad(*words, **more):
            raise error or RuntimeError("poison")
        return real(*words, **more)

    setattr(owner, name, poisoned)


class PoisonedText:
    """A request's stream of text that fails after some tokens, or at the end."""

    def __init__(self, real: Any, place: str) -> None:
        self._real, self._place, self._count = real, place, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def feed(self, token: int) -> Any:
        self._count += 1
        if self._count > AFTER and self._place != "end of text":
            raise Panic("poison") if self._place == "panic" else TypeError("poison")
        return self._real.feed(token)

    def finish(self, **how: Any) -> Any:
        if self._place == "end of text":
            raise TypeError("poison")
        return self._real.finish(**how)


def poison() -> None:
    places: dict[int, str] = {}  # of requests that are to fail when something of them is sent
    lead = Answer.lead

    def poisoned_lead(self: Answer, *words: Any) -> None:
        if is_poisoned(self.request, "detokenizer made"):
            raise RuntimeError("poison")
        lead(self, *words)
        for place in PLACES:
            if is_poisoned(self.request, place):
                places[self.request.id] = place
                self._text = PoisonedText(self._text, place) if place in TEXT else self._text  # type: ignore[assignment]

    Answer.lead = poisoned_lead  # type: ignore[assignment, method-assign]
    fail_where(answer_module, "read_prompt", lambda request, *_, **__: is_poisoned(request, "prompt"))
    fail_where(Sampler, "__init__", lambda _, request, **__: is_poisoned(request, "sampler made"))
    fail_where(
        Sampler, "_adjust", lambda self, *_: is_late(self, "logits") or is_poisoned(self._request, "first logits")
    )
    fail_where(
        Sampler, "_choose", lambda self, *_: is_late(self, "sample") or is_poisoned(self._request, "first sample")
    )
    fail_where(Answer, "_read", lambda self, *_: is_poisoned(self.request, "odds") and self.count > AFTER)
    kinds = {"progress sent": Prefilled, "token sent": Token, "end sent": Done}
    fail_where(
        controller_link,
        "encode",
        lambda event: (place := places.get(getattr(event, "id", 0))) in kinds and type(event) is kinds[place],
    )


TEXT = ("detokenizer", "panic", "end of text")


def is_late(sampler: Sampler, place: str) -> bool:
    return is_poisoned(sampler._request, place) and sampler._position > AFTER


if __name__ == "__main__":
    assert answer_module.Answer is Answer
    poison()
    worker.main()
