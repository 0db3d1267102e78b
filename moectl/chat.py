"""The conversation at a terminal that `moectl run` opens without a prompt: read, answer, again, and a few commands.

It reads and edits lines with prompt_toolkit and writes what comes; who answers is a function that it is given. It knows
no socket, no session and no click.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moectl.disk import write_whole
from moectl.errors import MoectlError, UsageError
from moectl.leash import Done, Token
from moectl.report import stats_text

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

Fields = dict[str, Any]
Answer = Callable[[Fields], Iterator[Token | Done]]  # a chat completion's fields → its events; closing it cancels

SCHEMA = "moectl.chat/1"
FENCE = '"""'
HELP = """\
/set NAME VALUE   set system, temperature, top_p, top_k, min_p, seed, max_tokens or stop; /set alone lists them
/show             show what answers, and how
/clear            forget the conversation
/save FILE        keep the conversation in a file
/load FILE        go on with one that was kept
/stats            show speeds after every answer, or stop that
/bye              leave (or Ctrl-D)
/?                this
Begin and end a text of several lines with \"\"\". Ctrl-C stops an answer."""

# Whatever the model says must not drive the terminal: no escape sequences, no bells, no carriage returns.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_KINDS: Mapping[str, Callable[[str], Any]] = {
    "system": str,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "seed": int,
    "max_tokens": int,
    "stop": str,
}


@dataclass
class Conversation:
    """What was said so far, and how to answer."""

    settings: Fields
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Fields:
        """Add a question; return the fields of the completion that answers it."""
        self.messages.append({"role": "user", "content": text})
        settings = dict(self.settings)
        system = settings.pop("system", None)
        first = [{"role": "system", "content": system}] if system else []
        return {**settings, "messages": [*first, *self.messages]}

    def change(self, name: str, value: str) -> None:
        """Change one setting. Raises UsageError when there is no such one, or the value is none."""
        if name not in _KINDS:
            raise UsageError(f"there is no setting {name!r}", hint=f"/set {'|'.join(_KINDS)} VALUE")
        try:
            self.settings[name] = _KINDS[name](value)
        except ValueError:
            raise UsageError(f"{name} should be a number, it is {value!r}") from None

    def save(self, path: Path) -> None:
        """Keep everything in a file. Raises StateError."""
        document = {"schema": SCHEMA, "settings": self.settings, "messages": self.messages}
        write_whole(path, json.dumps(document, indent=1, ensure_ascii=False).encode())

    def load(self, path: Path) -> None:
        """Take everything from a file instead. Raises UsageError, and then nothing has changed."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError("another schema")
            settings = {str(k): v for k, v in document["settings"].items() if k in _KINDS}
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in document["messages"]]
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UsageError(f"{path} is no conversation of moectl", hint="/save FILE makes one") from None
        self.settings, self.messages = settings, messages


def chat(answer: Answer, title: str, settings: Fields, *, history: Path | None, stats: bool = False) -> None:
    """Talk until the person leaves; `history` keeps the lines for next time, None keeps them here only.

    Answers go to stdout, everything else to stderr.
    """
    _Loop(answer, title, Conversation(settings), _open_session(history), stats).run()


def neutralise(text: str) -> str:
    """Return text whose control characters, newline and tab apart, are replaced by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def _open_session(history: Path | None) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if history is None:
        return PromptSession(history=InMemoryHistory())
    try:
        history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(history, os.O_WRONLY | os.O_CREAT, 0o600))
        history.chmod(0o600)
    except OSError:
        return PromptSession(history=InMemoryHistory())  # a history is no reason to be silent
    return PromptSession(history=FileHistory(str(history)))


class _Loop:
    def __init__(
        self, answer: Answer, title: str, conversation: Conversation, session: PromptSession[str], stats: bool
    ) -> None:
        self._answer = answer
        self._title = title
        self._talk = conversation
        self._session = session
        self._stats = stats
        self._last: Done | None = None

    def run(self) -> None:
        self._say(f"{self._title} /? for help, Ctrl-D to leave.")
        while True:
            try:
                text = self._read()
                if text is None:
                    return
            except KeyboardInterrupt:
                self._say("Use Ctrl-D or /bye to leave.")
                continue
            try:
                if text.startswith("/"):
                    if not self._obey(text):
                        return
                elif text.strip():
                    self._converse(text.removeprefix(FENCE).removesuffix(FENCE) if text.startswith(FENCE) else text)
            except MoectlError as error:
                self._say(f"Error: {error}" + (f"\nHint: {error.hint}" if error.hint else ""))

    def _say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _read(self) -> str | None:
        """Return what was typed, a block between fences as a whole with them; None when the person leaves."""
        try:
            text = self._session.prompt(">>> ")
            if text.startswith(FENCE):
                while len(text) < 2 * len(FENCE) or not text.rstrip().endswith(FENCE):
                    text += "\n" + self._session.prompt("... ")
                text = text.rstrip()
        except EOFError:
            return None
        return text

    def _converse(self, text: str) -> None:
        fields = self._talk.ask(text)
        pieces: list[str] = []
        events = self._answer(fields)
        try:
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    if isinstance(event, Done):
                        self._last = event
                        continue
                    pieces.append(event.text)
                    sys.stdout.write(neutralise(event.text))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # what has been said stands
        except MoectlError:
            if not pieces:
                self._talk.messages.pop()  # a question without an answer is asked again, not remembered
            raise
        finally:
            if pieces:
                self._talk.messages.append({"role": "assistant", "content": "".join(pieces)})
            sys.stdout.write("\n")
            sys.stdout.flush()
        if self._stats and self._last is not None:
            self._say(stats_text(self._last.stats))

    def _obey(self, line: str) -> bool:
        """Obey a command; return whether to go on."""
        try:
            word, *arguments = shlex.split(line)
        except ValueError:  # a quotation mark that nobody closed
            word, *arguments = line.split()
        if word in ("/bye", "/exit"):
            return False
        plain = {
            "/?": self._help,
            "/help": self._help,
            "/clear": self._clear,
            "/stats": self._toggle_stats,
            "/show": self._show,
        }
        if word in plain:
            plain[word]()
        elif word == "/set":
            self._set(arguments)
        elif word in ("/save", "/load"):
            self._use_file(word, arguments)
        else:
            self._say(f"Unknown command {word!r}. Type /? for help.")
        return True

    def _help(self) -> None:
        self._say(HELP)

    def _clear(self) -> None:
        self._talk.messages.clear()
        self._say("The conversation is forgotten.")

    def _toggle_stats(self) -> None:
        self._stats = not self._stats
        last = f"\n{stats_text(self._last.stats)}" if self._stats and self._last is not None else ""
        self._say(f"Speeds are {'shown' if self._stats else 'not shown'} after every answer.{last}")

    def _show(self) -> None:
        said = len(self._talk.messages)
        self._say(f"{self._title}\n{said} message{'s' * (said != 1)} so far\n{self._list_settings()}")

    def _set(self, arguments: list[str]) -> None:
        if len(arguments) == 1:
            raise UsageError(f"{arguments[0]} to what?", hint=f"/set {arguments[0]} VALUE")
        if arguments:
            self._talk.change(arguments[0], " ".join(arguments[1:]))
        self._say(self._list_settings())

    def _use_file(self, word: str, arguments: list[str]) -> None:
        if len(arguments) != 1:
            raise UsageError(f"{word} wants one file", hint=f"{word} FILE")
        path = Path(arguments[0]).expanduser()
        if word == "/save":
            self._talk.save(path)
            self._say(f"Kept in {path}.")
        else:
            self._talk.load(path)
            self._say(f"{len(self._talk.messages)} messages from {path}.")

    def _list_settings(self) -> str:
        return "\n".join(f"{name} = {value!r}" for name, value in self._talk.settings.items()) or "nothing is set"
