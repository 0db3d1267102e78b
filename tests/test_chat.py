"""The chat in a real pseudo-terminal, seen as a person sees it, on a screen."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moectl.chat import Conversation, neutralise
from moectl.demo import demo_dir
from moectl.errors import UsageError
from tests.ring import process_env

WIDTH, HEIGHT = 160, 40


class Terminal:
    """A program in a pseudo-terminal and the screen that it draws."""

    def __init__(self, words: list[str], directory: Path) -> None:
        env = {**process_env(), "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.child = pexpect.spawn(
            sys.executable, words, env=env, dimensions=(HEIGHT, WIDTH), encoding="utf-8", timeout=30, cwd=str(directory)
        )
        self.screen = pyte.Screen(WIDTH, HEIGHT)
        self._stream = pyte.Stream(self.screen)

    def wait(self, seen: Callable[[str], bool], what: str) -> str:
        """Draw until the screen satisfies `seen`."""
        end = time.monotonic() + 60
        while not seen(self.text):
            assert time.monotonic() < end, f"{what} was not seen on\n{self.text}"
            try:
                self._stream.feed(self.child.read_nonblocking(4096, timeout=1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert seen(self.text), f"it ended, and {what} was not seen on\n{self.text}"
        return self.text

    def see(self, text: str) -> str:
        return self.wait(lambda screen: text in screen, repr(text))

    def prompt(self) -> None:
        """Wait for an empty prompt."""
        self.wait(lambda screen: screen.rstrip().split("\n")[-1].rstrip() == ">>>", "an empty prompt")

    def say(self, line: str) -> None:
        self.prompt()
        self.child.send(line + "\r")

    def end(self) -> int:
        """Read on until the program has ended; return its exit code."""
        while True:
            try:
                self._stream.feed(self.child.read_nonblocking(4096, timeout=30))
            except pexpect.EOF:
                break
        self.child.close()
        assert self.child.exitstatus is not None, f"ended by signal {self.child.signalstatus}"
        return int(self.child.exitstatus)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "record"
    path.touch()
    return path


@pytest.fixture
def terminal(tmp_path: Path, record: Path) -> Iterator[Terminal]:
    started = start(tmp_path / "history", record)
    yield started
    started.child.close(force=True)


def start(history: Path | str, record: Path) -> Terminal:
    return Terminal(["-m", "tests.chat_script", str(history), str(record)], Path(__file__).parent.parent)


def asked(record: Path) -> list[Any]:
    return [line["asked"] for line in map(json.loads, record.read_text().splitlines()) if "asked" in line]


def test_a_conversation(terminal: Terminal, record: Path) -> None:
    terminal.see("Echo on 2 hosts. /? for help, Ctrl-D to leave.")
    terminal.say("Hello")
    terminal.see("You said: Hello")
    terminal.say("Again")
    terminal.see("You said: Again")
    first, second = asked(record)
    assert first == {"max_tokens": 256, "messages": [{"role": "user", "content": "Hello"}]}
    assert [m["content"] for m in second["messages"]] == ["Hello", "You said: Hello", "Again"]
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "user"]
    terminal.say("   ")
    terminal.say("/bye")
    assert terminal.end() == 0
    assert len(asked(record)) == 2


def test_ctrl_d_leaves(terminal: Terminal, record: Path) -> None:
    terminal.prompt()
    terminal.child.send("\x04")
    assert terminal.end() == 0
    assert "left" in record.read_text()


def test_ctrl_c_stops_the_answer_only(terminal: Terminal, record: Path) -> None:
    terminal.say("endless")
    terminal.see("You said: on and on and")
    terminal.child.send("\x03")
    terminal.say("Hello")
    terminal.see("You said: Hello")
    said = asked(record)[1]["messages"]
    assert said[1]["content"].startswith("You said: on and ")  # what was said stands
    assert [json.loads(line) for line in record.read_text().splitlines()].count({"closed": True}) == 2


def test_ctrl_c_at_the_prompt_clears_the_line(terminal: Terminal, record: Path) -> None:
    terminal.prompt()
    terminal.child.send("half a li")
    terminal.see("half a li")
    terminal.child.send("\x03")
    terminal.see("Use Ctrl-D or /bye to leave.")
    terminal.say("whole")
    terminal.see("You said: whole")
    assert asked(record)[0]["messages"][0]["content"] == "whole"


def test_several_lines(terminal: Terminal, record: Path) -> None:
    terminal.say('"""one')
    terminal.wait(lambda screen: screen.endswith("..."), "the prompt of a second line")
    terminal.child.send("two\r")
    terminal.child.send('three"""\r')
    terminal.see("You said: one")
    terminal.say('"""short"""')
    terminal.see("You said: short")
    assert [fields["messages"][-1]["content"] for fields in asked(record)] == ["one\ntwo\nthree", "short"]


def test_pasted_lines_are_one_message(terminal: Terminal, record: Path) -> None:
    terminal.prompt()
    terminal.child.send("\x1b[200~first\nsecond\n/bye\x1b[201~")
    terminal.see("second")
    terminal.child.send("\r")
    terminal.see("You said: first")
    assert asked(record)[0]["messages"][0]["content"] == "first\nsecond\n/bye"


def test_wide_characters_are_edited_whole(terminal: Terminal, record: Path) -> None:
    terminal.prompt()
    terminal.child.send("日本語🙂x")
    terminal.see("x")
    terminal.child.send("\x7f\x7f\x7f語!\r")
    terminal.see("You said:")
    terminal.prompt()
    assert asked(record)[0]["messages"][0]["content"] == "日本語!"
    assert any("".join(line.split()) == "Yousaid:日本語!" for line in terminal.text.split("\n"))


def test_the_line_is_edited_and_remembered(tmp_path: Path, record: Path) -> None:
    history = tmp_path / "history"
    first = start(history, record)
    first.say("helo world\x01\x1b[C\x1b[C\x1b[Cl")  # Ctrl-A, three to the right, the missing letter
    first.see("You said: hello world")
    first.say("/bye")
    assert first.end() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    second = start(history, record)
    second.prompt()
    second.child.send("\x1b[A")
    second.see(">>> /bye")
    second.child.send("\x1b[A")
    second.see(">>> hello world")
    second.child.send("\x15")
    second.say("/bye")
    second.end()
    third = start("-", record)
    third.prompt()
    third.child.send("\x1b[Anothing\r")
    third.see("You said: nothing")
    third.say("/bye")
    third.end()
    assert "nothing" not in history.read_text()


def test_settings(terminal: Terminal, record: Path) -> None:
    terminal.say('/set system "Be brief."')
    terminal.see("system = 'Be brief.'")
    terminal.say("/set temperature 0.5")
    terminal.see("temperature = 0.5")
    terminal.say("/set temperature warm")
    terminal.see("Error: temperature should be a number, it is 'warm'")
    terminal.say("/set colour red")
    terminal.see("Error: there is no setting 'colour'")
    terminal.say("/set seed")
    terminal.see("Error: seed to what?")
    terminal.say("Hello")
    terminal.see("You said: Hello")
    [fields] = asked(record)
    assert fields["temperature"] == 0.5
    assert fields["messages"][0] == {"role": "system", "content": "Be brief."}
    terminal.say("/show")
    terminal.see("2 messages so far")
    terminal.say("/clear")
    terminal.see("The conversation is forgotten.")
    terminal.say("Hi")
    terminal.see("You said: Hi")
    assert [m["content"] for m in asked(record)[1]["messages"]] == ["Be brief.", "Hi"]


def test_help_stats_and_what_is_no_command(terminal: Terminal) -> None:
    terminal.say("/?")
    screen = terminal.see("Ctrl-C stops an answer.")
    assert all(command in screen for command in ("/set", "/show", "/clear", "/save", "/load", "/stats", "/bye"))
    terminal.say("/stats")
    terminal.see("Speeds are shown after every answer.")
    terminal.say("Hello")
    terminal.see("7 prompt tokens at 70.0 tok/s")
    terminal.say("/usr/bin/env is a path")
    terminal.see("Unknown command '/usr/bin/env'. Type /? for help.")
    terminal.say("/save")
    terminal.see("Error: /save wants one file")
    terminal.say("/set 'unclosed")
    terminal.see("Error: 'unclosed to what?")


def test_a_conversation_is_kept_and_taken_up_again(terminal: Terminal, record: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept conversation.json"
    terminal.say("Hello")
    terminal.see("You said: Hello")
    terminal.say(f"/save '{file}'")
    terminal.see("Kept in")
    terminal.say("/clear")
    terminal.see("forgotten")
    (tmp_path / "bad").write_text('{"schema": 3}')
    terminal.say(f"/load {tmp_path / 'bad'}")
    terminal.see("is no conversation of moectl")
    terminal.say(f"/load {tmp_path / 'missing'}")
    terminal.see("cannot be read: No such file or directory")
    terminal.say(f"/load '{file}'")
    terminal.see("2 messages from")
    terminal.say("Again")
    terminal.see("You said: Again")
    assert [m["content"] for m in asked(record)[-1]["messages"]] == ["Hello", "You said: Hello", "Again"]


def test_errors_are_told_and_the_chat_goes_on(terminal: Terminal, record: Path) -> None:
    terminal.say("refuse")
    terminal.see("Error: the prompt is too long")
    terminal.see("Hint: shorten it")
    terminal.say("break")
    terminal.see("Error: mac2: rank 1 was lost")
    terminal.say("Hello")
    terminal.see("You said: Hello")
    # A question that nobody answered is forgotten, a half answer is not.
    assert [m["content"] for m in asked(record)[-1]["messages"]] == ["break", "You said: ", "Hello"]


def test_the_model_does_not_drive_the_terminal(terminal: Terminal) -> None:
    terminal.say("escape")
    terminal.see("\ufffd[31mred\ufffd\ufffd1m\ufffdescape")
    assert terminal.screen.buffer[3][5].fg == "default"


@given(st.text())
def test_only_control_characters_are_replaced(text: str) -> None:
    shown = neutralise(text)
    assert len(shown) == len(text)
    assert all(a == b or (b == "\ufffd" and not a.isprintable()) for a, b in zip(text, shown, strict=True))
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_setting_is_taken_or_refused(name: str, value: str) -> None:
    talk = Conversation({})
    for key in (name, "temperature", "top_k", "system"):
        with contextlib.suppress(UsageError):
            talk.change(key, value)
    assert talk.settings["system"] == value
    assert set(talk.settings) <= {"system", "temperature", "top_k", name}


def test_run_without_a_prompt_chats(tmp_path: Path) -> None:
    words = ["-m", "moectl", "run", "--local", "1", "--model", str(demo_dir()), "--keep-alive", "0", "--stats"]
    terminal = Terminal(words, tmp_path)
    terminal.see("moectl-demo-bf16-hidden-1 on 1 rank of this machine. /? for help")
    terminal.say("What is expert parallelism?")
    terminal.see("prompt tokens at")
    terminal.say("/bye")
    assert terminal.end() == 0
