"""A conversation at the terminal, as `moectl run` opens it without a prompt. It is used like ollama's.

It knows no HTTP and no session: an `Answer` answers. stdout carries the answers, everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from moectl.cli.chat.settings import ALIASES, ChatSettings, change_setting, settings_table, split_words, value_text
from moectl.cli.chat.transcript import Message, Transcript, load_transcript, save_transcript
from moectl.cli.terminal import AnswerWriter, stats_text, write_answer
from moectl.engine.protocol import Done
from moectl.errors import MoectlError, RemoteError, UsageError
from moectl.server.contracts import Thinking
from moectl.text import colour_wanted, printable

if TYPE_CHECKING:
    from moectl.cli.chat.keyboard import Keyboard
    from moectl.engine.request import Stats

# Yields the answer to a conversation, which begins with the system message if there is one; the last item is Done.
# A KeyboardInterrupt while it waits, or `close()`, has to stop the answer on the cluster: in a `finally`, which no
# second one disturbs for two seconds. Raises MoectlError.
Answer = Callable[[Sequence[Message], ChatSettings], Generator[str | Thinking | Done, None, None]]

HELP = '''\
Available commands:
  /set            List the settings, or change one: /set temperature 0.7
  /show           Show the model, the system message and the settings
  /load FILE      Go on with a saved chat
  /save FILE      Save this chat
  /clear          Forget what has been said
  /stats          Show speeds after each answer, or no longer
  /bye            Leave
  /?, /help       This help; also /? set, /? show, /? shortcuts

Use """ to begin a message of several lines and """ to end it.
A message that begins with "/" needs a space before it.'''

HELP_SET = '''\
  /set NAME VALUE       Change a setting; /set alone lists their names and values
  /set system "TEXT"    Set the system message; of several lines with """; "" for none
  /set stop "A" "B"     End answers at these texts
  /set think, nothink   Let the model think before it answers, or not
  /set verbose, quiet   Show speeds after each answer, or do not
  /set history, nohistory
                        Remember what is typed from here on, or do not'''

HELP_SHOW = """\
  /show info            The model
  /show system          The system message
  /show parameters      The settings"""

HELP_SHORTCUTS = """\
  Ctrl-A, Ctrl-E        To the beginning, the end of the line
  Alt-B, Alt-F          Back, forward one word
  Ctrl-K, Ctrl-U        Delete to the end, to the beginning of the line
  Ctrl-W                Delete the word before the cursor
  Up, Down, Ctrl-R      Earlier and later messages; search them
  Alt-Enter             Begin another line
  Ctrl-X Ctrl-E         Edit the message in $EDITOR
  Ctrl-L                Clear the screen
  Ctrl-C                Stop the answer, or clear what is typed
  Ctrl-D                Leave"""

_SYSTEM = re.compile(r'\A/set\s+(?:parameter\s+)?system\s+(?=""")')
_CLOSING = re.compile(r'"""[ \t]*$', re.MULTILINE)


def chat(
    model: str,
    answer: Answer,
    settings: ChatSettings,
    *,
    history: Path | None,
    stats: bool = False,
    hides_thinking: bool = False,
    color: str = "auto",
) -> None:
    """Talk with the person at the terminal until they leave; call it in the main thread, which gets the signals.

    `model` is what the banner says, such as "DBRX on 4 hosts"; `history` is the file that remembers what was typed
    (None: no file). Raises UsageError where there is no terminal.
    """
    from moectl.cli.chat.keyboard import Keyboard

    screen = sys.stderr if sys.stderr.isatty() else sys.stdout
    coloured = colour_wanted(color, screen)
    writer = AnswerWriter(hides_thinking=hides_thinking, color=color)
    talk = _Chat(model, answer, settings, screen, writer, stats=stats, coloured=coloured)
    keyboard = Keyboard(screen, history=history, is_open=is_open, say=talk.say, coloured=coloured)
    with keyboard.attached():
        talk.run(keyboard)


def is_open(text: str) -> bool:
    """Return whether a block was begun that is not ended yet."""
    return read_block(_SYSTEM.sub("", text, count=1)) is None


def read_block(text: str) -> str | None:
    """Return a message without the quotes of a block around it; None when the block is not ended yet.

    As ollama has it: the text may begin on the opening line and end on the closing one.
    """
    if not text.startswith('"""'):
        return text
    body = text[3:]
    closing = _CLOSING.search(body)
    if closing is None:
        return None
    if body[closing.end() :].strip():
        return text  # quotes within a text, such as a pasted Python file
    return body[: closing.start()].removeprefix("\n").removesuffix("\n")


def is_command(text: str) -> bool:
    """Return whether a text is a command; several lines that begin with a path are for the model."""
    return text.startswith("/") and ("\n" not in text.strip() or _SYSTEM.match(text) is not None)


class _Leave(Exception):
    """The person wants to go."""


class _Chat:
    def __init__(
        self,
        model: str,
        answer: Answer,
        settings: ChatSettings,
        screen: TextIO,
        writer: AnswerWriter,
        *,
        stats: bool,
        coloured: bool,
    ) -> None:
        self._model, self._answer = model, answer
        self._settings = settings
        self._screen, self._writer = screen, writer
        self._stats, self._coloured = stats, coloured
        self._messages: tuple[Message, ...] = ()
        self._last: Stats | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/?": self._help,
            "/help": self._help,
            "/set": self._set,
            "/show": self._show,
            "/load": self._load,
            "/save": self._save,
            "/clear": self._clear,
            "/stats": self._toggle_stats,
            "/bye": self._leave,
            "/exit": self._leave,
        }

    def run(self, keyboard: Keyboard) -> None:
        self._keyboard = keyboard
        self.say(f"{self._model}. /? for help, Ctrl-D to leave.")
        with contextlib.suppress(_Leave):
            while True:
                try:
                    self._take(self._read())
                except KeyboardInterrupt:
                    self.say("Use Ctrl-D or /bye to leave.")

    def _read(self) -> str:
        try:
            return self._keyboard.read()
        except EOFError:
            raise _Leave from None

    def _take(self, text: str) -> None:
        try:
            if is_command(text):
                self._obey(text)
            else:
                block = read_block(text)
                self._ask(text if block is None else block)
        except MoectlError as error:
            self._say_error(error)

    # What is said. The answer goes to stdout, all else to the screen.

    def say(self, text: str) -> None:
        self._screen.write(printable(text) + "\n")
        self._screen.flush()

    def _say_error(self, error: MoectlError) -> None:
        mark = "\x1b[31m\x1b[1mError:\x1b[0m" if self._coloured else "Error:"
        self._screen.write(f"{mark} {printable(str(error))}\n")
        if error.hint:
            self._screen.write(f"Hint: {printable(error.hint)}\n")
        self._screen.flush()

    # Questions and answers.

    def _ask(self, text: str) -> None:
        if not text.strip():
            return
        question = Message("user", text)
        pieces: list[str] = []
        thoughts: list[str] = []
        finished, reason = None, "cancelled"
        interrupted = False
        try:
            with self._keyboard.waiting():
                finished = self._stream(question, pieces, thoughts)
            reason = finished.finish_reason
        except KeyboardInterrupt:
            interrupted = True
        finally:
            self._end_line("".join(pieces), interrupted)
        # A question without any answer is taken back, like one that failed: roles have to take turns.
        if pieces or finished:
            answer = Message("assistant", "".join(pieces), reason, "".join(thoughts) or None)
            self._messages = (*self._messages, question, answer)
        self._say_end(finished)

    def _stream(self, question: Message, pieces: list[str], thoughts: list[str]) -> Done:
        system = self._settings.system
        before = (Message("system", system),) if system else ()
        with contextlib.closing(self._answer((*before, *self._messages, question), self._settings)) as stream:
            for event in self._keyboard.interruptible(stream):
                if isinstance(event, Done):
                    return event
                if isinstance(event, Thinking):
                    thoughts.append(event.text)
                else:
                    pieces.append(event)
                self._writer.write(event)
        raise RemoteError("the answer broke off", hint="ask again")

    def _end_line(self, answer: str, interrupted: bool) -> None:
        self._screen.write("^C" if interrupted else "")
        self._screen.flush()
        unfinished = self._writer.end_thinking() or (bool(answer) and not answer.endswith("\n"))
        if unfinished:
            write_answer("\n")
        if interrupted and not (unfinished and sys.stdout.isatty()):
            self.say("")

    def _say_end(self, finished: Done | None) -> None:
        if finished and finished.finish_reason == "length":
            limit = self._settings.max_tokens
            if limit is None or finished.stats.completion_tokens < limit:
                self.say("[cut: the context is full. /clear begins a new chat]")
            else:
                self.say(f"[cut after {limit} tokens: /set max_tokens {4 * limit} allows more]")
        if finished:
            self._last = finished.stats
            if self._stats:
                self.say(stats_text(finished.stats))
        self.say("")

    # Commands.

    def _obey(self, text: str) -> None:
        name, *rest = text.split(maxsplit=1)
        command = self._commands.get(name)
        if command is None:
            self.say(f"Unknown command '{name}'. Type /? for help.")
            return
        command(rest[0].strip() if rest else "")

    def _help(self, topic: str) -> None:
        topics = {"set": HELP_SET, "show": HELP_SHOW, "shortcut": HELP_SHORTCUTS, "shortcuts": HELP_SHORTCUTS}
        self.say(topics.get(topic.removeprefix("/"), HELP) + "\n")

    def _set(self, rest: str) -> None:
        words = rest.split(maxsplit=1)
        if words and words[0] == "parameter":  # ollama's spelling
            words = words[1].split(maxsplit=1) if len(words) > 1 else []
        name, value = (*words, "", "")[:2]
        if not name:
            self._show_parameters()
        elif name in ("verbose", "quiet"):
            self._stats = name == "verbose"
            self.say(f"Set '{name}' mode.")
        elif name in ("think", "nothink") and not value:
            self._change("think", "true" if name == "think" else "false")
        elif name in ("history", "nohistory"):
            self._keyboard.remembers = name == "history"
            self.say(f"Set '{name}' mode.")
        else:
            self._change(ALIASES.get(name, name), value)

    def _change(self, name: str, value: str) -> None:
        if name == "system" and value.startswith('"""'):
            self._settings = replace(self._settings, system=read_block(value) or None)
        else:
            self._settings = change_setting(self._settings, name, value)
        if name == "system":
            self.say("Set system message." if self._settings.system else "Removed system message.")
        else:
            self.say(f"Set {name} to {value_text(getattr(self._settings, name))}.")

    def _show(self, what: str) -> None:
        parts = {"info": self._show_info, "system": self._show_system, "parameters": self._show_parameters}
        if not what:
            self._show_info()
            self._show_parameters()
        elif what in parts:
            parts[what]()
        else:
            self.say(f"Unknown command '/show {what}'. Type /? for help.")

    def _show_info(self) -> None:
        self.say(f"  model     {self._model}\n  messages  {len(self._messages)}")

    def _show_system(self) -> None:
        self.say(self._settings.system or "There is no system message.")

    def _show_parameters(self) -> None:
        for name, value, allowed in settings_table(self._settings):
            self.say(f"  {name:18}  {value:8}  {allowed}")

    def _save(self, rest: str) -> None:
        path = _read_path("/save", rest)
        save_transcript(path, Transcript(self._model, self._settings, self._messages))
        self.say(f"Saved {len(self._messages)} messages in {path}.")

    def _load(self, rest: str) -> None:
        path = _read_path("/load", rest)
        loaded = load_transcript(path, self._settings)
        self._settings, self._messages = loaded.settings, loaded.messages
        self.say(f"Loaded {len(self._messages)} messages from {path}.")

    def _clear(self, _: str) -> None:
        self._messages = ()
        self.say("Cleared session context.")

    def _toggle_stats(self, _: str) -> None:
        self._stats = not self._stats
        self.say(f"Speeds are {'shown' if self._stats else 'no longer shown'} after each answer.")
        if self._stats and self._last:
            self.say(stats_text(self._last))

    def _leave(self, _: str) -> None:
        raise _Leave


def _read_path(command: str, rest: str) -> Path:
    words = split_words(rest)
    if len(words) != 1:
        raise UsageError(f"one file should be named: {command} FILE")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no such home directory: {words[0]}") from None
