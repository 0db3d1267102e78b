"""The load under chaos: clients that stream answers over HTTP and hold each one against the undisturbed one.

Every request ends as one `Outcome`. What is no exact answer has to be one clear error; anything else is a violation,
named in `Outcome.violation`. It knows controllers only by their lives (`chaos_site`), and breaks nothing.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.system.chaos_site import Life, Site

LIMIT_S = 150.0  # for one request, whatever happens
PAUSE_S = 1.0  # after a request that found nobody, or lost whom it had found
_COMMON = {"stream": True, "ignore_eos": True}


def _say(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


_ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("completions", {"prompt": "Expert parallelism", "max_tokens": 40, "temperature": 0}),
    ("completions", {"prompt": "What is a ring?", "max_tokens": 60, "temperature": 0}),
    ("completions", {"prompt": "moectl runs", "max_tokens": 50, "temperature": 1.2, "top_p": 0.95, "seed": 11}),
    ("chat/completions", {"messages": [{"role": "user", "content": "What is DBRX?"}], "max_tokens": 30, "seed": 5}),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "Who routes?"}], "max_tokens": 45, "temperature": 0},
    ),
)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and how the undisturbed answer ends and reads."""

    path: str
    fields: dict[str, Any]
    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None


@dataclass(slots=True)
class Outcome:
    """One request and what came of it."""

    question: Question
    began_s: float
    ended_s: float = 0.0
    kind: str = ""  # exact, error, refused, broken, left; wrong and hung are always violations
    text: str = ""
    message: str = ""  # of the error, or of the HTTP library
    notices: list[str] = field(default_factory=list)  # what the stream said to people meanwhile
    notices_after_text: int = 0
    finish_reason: str | None = None
    tokens: int | None = None
    errors: int = 0
    violation: str = ""

    @property
    def resumed(self) -> bool:
        """Whether the answer went on after the cluster had been down in the middle of it."""
        return self.kind == "exact" and self.notices_after_text > 0

    @property
    def waited(self) -> bool:
        """Whether the answer began only after the cluster had been down."""
        return self.kind == "exact" and bool(self.notices) and not self.notices_after_text


class Load:
    """Clients in threads; use `record` first, then `start`, `drain` and `go_on` as often as wanted, then `stop`."""

    def __init__(self, site: Site, seed: int, clients: int) -> None:
        self.site = site
        self.outcomes: list[Outcome] = []
        self.questions: tuple[Question, ...] = ()
        self._seed = seed
        self._clients = clients
        self._gate = threading.Event()
        self._over = threading.Event()
        self._under_way = 0
        self._to_leave = 0  # so many of the streams under way shall be closed by their clients
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def record(self) -> None:
        """Ask everything once, undisturbed and alone, and keep the answers as the exact ones."""
        found = []
        for path, fields in _ASKED:
            outcome = self.ask(Question(path, {**fields, **_COMMON}))
            assert outcome.finish_reason == "length", (outcome.message, outcome.text)
            assert len(outcome.text) > 20
            found.append(Question(path, outcome.question.fields, outcome.text, outcome.finish_reason, outcome.tokens))
        self.questions = tuple(found)

    def start(self) -> None:
        """Let the clients ask, one question after the other."""
        self._gate.set()
        for number in range(self._clients):
            thread = threading.Thread(target=self._run, args=(number,), name=f"client-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def drain(self) -> None:
        """Let the answers under way end, and no other begin until `go_on`."""
        self._gate.clear()
        end = time.monotonic() + LIMIT_S + 30
        while self._under_way:
            assert time.monotonic() < end, "a client hangs beyond all its limits"
            time.sleep(0.02)

    def go_on(self) -> None:
        """Let the clients ask again."""
        self._gate.set()

    def stop(self) -> None:
        """End the clients."""
        self.drain()
        self._over.set()
        self._gate.set()
        for thread in self._threads:
            thread.join()

    def leave(self, count: int) -> None:
        """Let so many clients go away in the middle of their answers."""
        with self._lock:
            self._to_leave = count

    def probe(self) -> Outcome:
        """Ask a question outside the clients' turn; what comes of it counts, too."""
        return self._ask_and_keep(self.questions[0])

    def _run(self, number: int) -> None:
        choice = random.Random(f"{self._seed} {number}")
        while True:
            self._gate.wait()
            with self._lock:
                if self._over.is_set():
                    return
                if not self._gate.is_set():
                    continue
                self._under_way += 1
            try:
                self._ask_and_keep(choice.choice(self.questions))
            finally:
                with self._lock:
                    self._under_way -= 1

    def _ask_and_keep(self, question: Question) -> Outcome:
        outcome = self.ask(question, leaves=self._take_leave)
        if outcome.kind in ("refused", "broken"):
            time.sleep(PAUSE_S)  # a connection ends some time before its process
        outcome.violation = judge(outcome, self.site.lives)
        self.outcomes.append(outcome)
        if outcome.kind not in ("exact", "refused") or outcome.violation or outcome.notices:
            said = " / ".join([*outcome.notices, *([outcome.message] if outcome.message else [])])
            text = f"request of {outcome.began_s:.2f} ended {outcome.kind} after {len(outcome.text)} letters: {said}"
            self.site.timeline.note(text + (f" VIOLATION {outcome.violation}" if outcome.violation else ""))
        return outcome

    def _take_leave(self) -> bool:
        with self._lock:
            leaves = self._to_leave > 0
            self._to_leave -= leaves
        return leaves

    def ask(self, question: Question, *, leaves: Callable[[], bool] = lambda: False) -> Outcome:
        """Stream one answer; `leaves` is asked after each piece whether to go away. Never raises."""
        outcome = Outcome(question, self.site.timeline.now_s())
        limits = httpx2.Timeout(LIMIT_S, connect=10.0)
        try:
            with httpx2.Client(base_url=self.site.url, timeout=limits) as http:
                self._stream(http, question, outcome, leaves)
        except httpx2.TimeoutException:
            outcome.kind = "hung"
        except httpx2.HTTPError as error:
            outcome.kind = "broken" if outcome.text or outcome.notices else "refused"
            outcome.message = f"{type(error).__name__}: {error}"
        outcome.ended_s = self.site.timeline.now_s()
        return outcome

    def _stream(self, http: httpx2.Client, question: Question, outcome: Outcome, leaves: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_S
        with http.stream("POST", f"/v1/{question.path}", json=question.fields) as response:
            if response.status_code != 200:
                _take_error(outcome, json.loads(response.read()))
                return
            for line in response.iter_lines():
                _take_line(outcome, line)
                if time.monotonic() > end:
                    outcome.kind = "hung"
                    return
                if outcome.text and leaves():
                    outcome.kind = "left"
                    return
        if not outcome.kind:
            outcome.kind = "ended"  # without [DONE]


def _take_line(outcome: Outcome, line: str) -> None:
    if line.startswith(": moectl: "):
        outcome.notices.append(line.removeprefix(": moectl: "))
        outcome.notices_after_text += bool(outcome.text)
    elif line == "data: [DONE]":
        outcome.kind = "error" if outcome.errors else "exact"
    elif line.startswith("data: "):
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            _take_error(outcome, chunk)
        for choice in chunk.get("choices", ()):
            outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
            outcome.tokens = choice.get("stats", {}).get("completion_tokens") or outcome.tokens


def _take_error(outcome: Outcome, body: dict[str, Any]) -> None:
    outcome.kind = "error"
    outcome.errors += 1
    outcome.message = body["error"]["message"]


def judge(outcome: Outcome, lives: list[Life]) -> str:
    """Return what is wrong with an outcome; empty when it is the exact answer or one clear error."""
    question = outcome.question
    if not question.text.startswith(outcome.text):
        outcome.kind = "wrong"
        return f"the answer reads {outcome.text!r}, undisturbed it is {question.text!r}"
    match outcome.kind:
        case "exact":
            return _judge_exact(outcome)
        case "error":
            return _judge_error(outcome)
        case "left":
            return ""
        case "refused":
            return f"nobody answered although one served: {outcome.message}" if _was_served(outcome, lives) else ""
        case "broken":
            return "" if _was_killed(outcome, lives) else f"it broke off without an error: {outcome.message}"
        case "hung":
            return f"it hung for {outcome.ended_s - outcome.began_s:.0f} s"
        case kind:
            return f"it ended without its last word ({kind})"


def _judge_exact(outcome: Outcome) -> str:
    question = outcome.question
    found = (outcome.text, outcome.finish_reason, outcome.tokens)
    exact = (question.text, question.finish_reason, question.tokens)
    return "" if found == exact else f"it ended as {found}, undisturbed it is {exact}"


def _judge_error(outcome: Outcome) -> str:
    message = outcome.message
    if outcome.errors != 1:
        return f"{outcome.errors} errors instead of one, the last is {message!r}"
    if "a bug in moectl" in message or "Traceback" in message:
        return f"the error is no clear one: {message!r}"
    if not any(word in message for word in ("node", "controller", "moectl is stopping", "requests wait already")):
        return f"the error names neither a host nor the controller: {message!r}"
    return ""


def _was_served(outcome: Outcome, lives: list[Life]) -> bool:
    """Whether one controller was there, and well, during the whole request, and some time after it."""
    return any(
        life.served_s is not None
        and life.served_s <= outcome.began_s
        and (life.ended_s is None or life.ended_s > outcome.ended_s + PAUSE_S)
        and (life.ended_s is not None or life.process.poll() is None)
        for life in lives
    )


def _was_killed(outcome: Outcome, lives: list[Life]) -> bool:
    """Whether a fault killed a controller during the request."""
    ends = [life.ended_s for life in lives if life.killed and life.ended_s is not None]
    return any(outcome.began_s <= end_s <= outcome.ended_s + PAUSE_S for end_s in ends)
