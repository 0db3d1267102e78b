"""The chat in a real pseudo-terminal: keys in, screen and answerer out; its grammar and files without one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given, strategies as st

from moectl.cli.chat.chat import is_command, is_open, read_block
from moectl.cli.chat.settings import ALIASES, ChatSettings, change_setting, settings_table, value_text
from moectl.cli.chat.transcript import Message, Transcript, load_transcript, save_transcript
from moectl.errors import UsageError
from moectl.model.parameters import EFFORTS
from moectl.text import printable
from tests.support.terminal import Terminal

pytestmark = [
    # From Python 3.12 on, what pexpect does is warned of in a process that has threads (MLX's, here).
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of forkpty:DeprecationWarning"),
]

UP, LEFT, BACKSPACE, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x7f", "\x03", "\x04"
PROMPT = ">>> Send a message (/? for help)"
HINT = "Use Ctrl-D or /bye to leave."


class Talk(Terminal):
    """A terminal with `chat_program` in it."""

    def __init__(
        self,
        directory: Path,
        *,
        history: Path | None = None,
        term: str = "xterm-256color",
        patience_s: float = 3600,
        **settings: Any,
    ):
        self.log = directory / "log.jsonl"
        program = (
            "-m",
            "tests.support.chat_program",
            str(self.log),
            str(history or "-"),
            json.dumps(settings),
            str(patience_s),
        )
        super().__init__([sys.executable, *program], directory, term=term)

    def ready(self) -> None:
        """Wait for an empty prompt."""
        self.wait(lambda: self.lines[-1] == PROMPT and self.screen.cursor.x == 4)

    def enter(self, text: str, end: str = "\r") -> list[str]:
        """Type a text and Enter; return the lines that appear below it before the next prompt."""
        mark = len(self.sent)
        self.type(text + end)
        left = b"\x1b[?2004l"  # the prompt's last word
        self.wait(lambda: left in self.sent[mark:] and self.lines[-1] == PROMPT and self.screen.cursor.x == 4)
        before = [i for i, line in enumerate(self.lines[:-1]) if line.startswith(">>>")]
        return self.lines[before[-1] + 1 : -1] if before else self.lines[:-1]

    def events(self, kind: str) -> list[Any]:
        """What the answerer noted: "asked", "settings" or "stopped"."""
        return [event[kind] for event in map(json.loads, self.log.read_text().splitlines()) if kind in event]

    def questions(self) -> list[str]:
        """The texts asked, one by one."""
        return [asked[-1][1] for asked in self.events("asked")]


# Coming, talking, going.


def test_a_conversation_remembers_what_was_said(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.lines == ["DBRX on 4 hosts. /? for help, Ctrl-D to leave.", PROMPT]
        assert talk.enter("hello") == ["You said: hello", ""]
        assert talk.enter("") == []
        assert talk.enter("  ") == []
        assert talk.enter(" /usr is a path") == ["You said: /usr is a path", ""]
        assert talk.events("asked") == [
            [["user", "hello"]],
            [["user", "hello"], ["assistant", "You said: hello"], ["user", " /usr is a path"]],
        ]
        talk.type(CTRL_D)
        assert talk.end() == 0
        assert talk.echoes
        assert not talk.events("stopped")


@pytest.mark.parametrize("word", ["/bye", "/exit"])
def test_words_that_leave(tmp_path: Path, word: str) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type(f"{word}\r")
        assert talk.end() == 0


def test_blocks_of_several_lines(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type('"""Explain\r')
        talk.wait(lambda: talk.lines[-2:] == ['>>> """Explain', "..."])
        talk.type("  expert\r")
        talk.wait(lambda: talk.lines[-2:] == ["...   expert", "..."])
        talk.enter('routing"""')
        talk.type('"""\r')
        talk.wait(lambda: talk.lines[-2:] == ['>>> """', "..."])
        talk.enter('own lines\r"""')
        talk.enter('"""one line"""')
        talk.enter("with\x1b\rAlt-Enter")
        talk.enter('say """ twice')
        assert talk.questions() == [
            "Explain\n  expert\nrouting", "own lines", "one line", "with\nAlt-Enter", 'say """ twice',
        ]  # fmt: skip


def test_ctrl_d_leaves_after_the_answer_during_which_it_was_typed(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("until go\r")
        talk.wait_for("begun")
        talk.type(CTRL_D)
        (tmp_path / "go").touch()
        assert talk.end() == 0
        assert not talk.events("stopped")


def test_sigterm_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.kill(signal.SIGTERM)
        assert talk.end() == 143
        assert talk.echoes


def test_sigterm_stops_the_answer(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("forever\r")
        talk.wait_for("router is")
        talk.kill(signal.SIGTERM)
        assert talk.end() == 143
        assert talk.echoes
        assert talk.events("stopped") == ["forever"]


# Ctrl-C.


@pytest.mark.parametrize(
    ("question", "begun", "kept"),
    [("forever", "The router is", True), ("flood", "word word", True), ("think", "", False)],
)
def test_ctrl_c_stops_the_answer_only(tmp_path: Path, question: str, begun: str, kept: bool) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type(f"{question}\r")
        talk.wait(lambda: talk.log.exists() and (begun in talk.lines[-1] if begun else talk.lines[-1] == ""))
        below = talk.enter("", end=CTRL_C)
        assert below[-2].endswith("^C")
        assert HINT not in below
        assert talk.events("stopped") == [question]
        assert talk.enter("hello") == ["You said: hello", ""]
        roles = [role for role, _ in talk.events("asked")[-1]]
        assert roles == (["user", "assistant", "user"] if kept else ["user"])
        if question == "forever":
            assert talk.events("asked")[-1][1] == ["assistant", "The router is"]
            assert talk.enter("/save chat.json") == ["Saved 4 messages in chat.json."]
            said = json.loads((tmp_path / "chat.json").read_text())["messages"]
            assert [m["finish_reason"] for m in said] == [None, "cancelled", None, "stop"]


def test_further_presses_do_not_disturb_what_the_first_began(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("reluctant go\r")
        talk.wait_for("router is")
        talk.type(CTRL_C)
        talk.wait(lambda: bool(talk.events("stopping")))
        presses = itertools.count()

        def pressed() -> bool:
            talk.type(CTRL_C)
            return next(presses) >= 3

        talk.wait(pressed)
        (tmp_path / "go").touch()
        talk.wait(lambda: talk.lines[-1] == PROMPT)
        assert talk.events("stopped") == ["reluctant go"]
        assert "The router is^C" in talk.lines  # the last press may have come to the prompt already
        talk.enter("hello")
        talk.wait(lambda: len(talk.events("asked")) == 2)
        assert talk.events("asked")[-1][1] == ["assistant", "The router is"]


def test_an_answer_that_does_not_stop_can_be_left(tmp_path: Path) -> None:
    with Talk(tmp_path, patience_s=0.1) as talk:
        talk.ready()
        talk.type("reluctant never\r")
        talk.wait_for("router is")

        def pressed() -> bool:
            talk.type(CTRL_C)
            return "The router is^C" in talk.lines

        talk.wait(pressed)
        assert talk.enter("", end=CTRL_C)[-1] == HINT
        talk.enter("hello")  # which may return early: one Ctrl-C too many makes a new prompt, too
        talk.wait(lambda: talk.questions() == ["reluctant never", "hello"])


def test_ctrl_c_at_the_prompt_clears_the_line(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("half a quest")
        talk.wait_for("half a quest")
        assert talk.enter("", end=CTRL_C) == [HINT]
        assert talk.enter("", end=CTRL_C) == [HINT]
        talk.type('"""begun\r')
        talk.wait(lambda: talk.lines[-1] == "...")
        assert talk.enter("", end=CTRL_C)[-1] == HINT
        assert talk.enter("hello") == ["You said: hello", ""]
        assert talk.questions() == ["hello"]


# The line editor.


def test_a_pasted_text_is_one_message(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.paste("/usr/bin/one\n  two\nthree\n")
        talk.wait(lambda: talk.lines[-4:] == [">>> /usr/bin/one", "...   two", "... three", "..."])
        assert not talk.log.exists()
        talk.enter("four")
        assert talk.questions() == ["/usr/bin/one\n  two\nthree\nfour"]


def test_keys_typed_during_an_answer_wait_for_the_prompt(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("until go\r")
        talk.wait_for("begun")
        talk.paste("two\nlines")
        talk.type(f" and more\rhello{UP}")
        (tmp_path / "go").touch()
        talk.wait_for("begun ended")
        talk.wait_for("You said: two lines and more")
        talk.wait_for("... lines and more")
        assert talk.questions()[1:] == ["two\nlines and more"]


def test_wide_characters(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("日本語🙂é")
        talk.wait(lambda: talk.screen.display[1].startswith(">>> 日本語🙂é") and talk.screen.cursor.x == 13)
        talk.type(BACKSPACE * 2)
        talk.wait(lambda: talk.screen.display[1].rstrip() == ">>> 日本語" and talk.screen.cursor.x == 10)
        talk.type(LEFT * 2 + "x")
        talk.wait(lambda: talk.screen.display[1].rstrip() == ">>> 日x本語" and talk.screen.cursor.x == 7)
        talk.type(BACKSPACE * 2)
        talk.wait(lambda: talk.screen.display[1].rstrip() == ">>> 本語" and talk.screen.cursor.x == 4)
        assert talk.enter("🙂") == ["You said: 🙂本語", ""]
        assert talk.questions() == ["🙂本語"]


def test_long_lines_wrap(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type("語" * 50)  # 100 columns
        talk.wait(lambda: talk.screen.display[1].startswith(">>> " + "語" * 38) and talk.screen.cursor.x == 24)
        assert talk.screen.display[2].rstrip() == "語" * 12
        talk.type(BACKSPACE * 13)
        talk.wait(lambda: talk.screen.display[2].rstrip() == "")
        talk.enter("")
        assert talk.questions() == ["語" * 37]


def test_bytes_that_are_not_utf_8_are_asked_as_replacement_signs(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        os.write(talk.fd, b"caf\xe9 x")
        talk.wait_for(" x")
        talk.enter("")
        assert talk.questions() == ["caf\ufffd x"]


def test_a_dumb_terminal_will_do(tmp_path: Path) -> None:
    with Talk(tmp_path, term="dumb") as talk:
        talk.wait(lambda: talk.lines[-1] == ">>>")
        talk.type("hello\r")
        talk.wait_for("You said: hello")
        talk.wait(lambda: talk.lines[-1] == ">>>")
        talk.type("/bye\r")
        assert talk.end() == 0


# History.


def test_history_is_kept_in_a_private_file(tmp_path: Path) -> None:
    history = tmp_path / "state" / "moectl" / "history"
    umask = os.umask(0)
    try:
        with Talk(tmp_path, history=history) as talk:
            talk.ready()
            assert history.stat().st_mode & 0o777 == 0o600
            history.unlink()  # the next message makes it anew
            talk.enter("first 語")
            talk.enter('"""a\r+b"""')
            talk.enter("/set nohistory")
            talk.enter("a secret")
            talk.enter("/set history")
            talk.type("/bye\r")
            assert talk.end() == 0
    finally:
        os.umask(umask)
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700
    kept = [line for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept == ["+first 語", '+"""a', '++b"""', "+/set nohistory", "+/bye"]
    with Talk(tmp_path, history=history) as talk:
        talk.ready()
        talk.type(UP)
        talk.wait(lambda: talk.lines[-1] == ">>> /bye")
        talk.type(UP * 2)
        talk.wait(lambda: talk.lines[-2:] == ['>>> """a', '... +b"""'])
        talk.type(UP * 2)
        talk.wait(lambda: talk.lines[-1] == ">>> first 語")
        assert talk.enter("") == ["You said: first 語", ""]


def test_without_history_no_file_is_made(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.enter("hello")
        talk.type(UP)
        talk.wait(lambda: talk.lines[-1] == ">>> hello")
        talk.enter("")
        talk.type("/bye\r")
        assert talk.end() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_an_old_history_is_made_private(tmp_path: Path) -> None:
    history = tmp_path / "history"
    history.touch()
    history.chmod(0o644)
    with Talk(tmp_path, history=history) as talk:
        talk.ready()
        assert history.stat().st_mode & 0o777 == 0o600


def test_a_long_history_is_shortened(tmp_path: Path) -> None:
    history = tmp_path / "history"
    history.write_text("".join(f"\n#\n+message {n} {'x' * 1000}\n" for n in range(1500)) + "\n#\n+the last\n")
    history.chmod(0o644)
    with Talk(tmp_path, history=history) as talk:
        talk.ready()
        assert history.stat().st_mode & 0o777 == 0o600
        assert 500_000 < history.stat().st_size <= 512 * 1024
        assert history.read_text().startswith("\n#\n+message ")
        talk.type(UP)
        talk.wait(lambda: talk.lines[-1] == ">>> the last")


def test_a_history_that_cannot_be_kept_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Talk(tmp_path, history=tmp_path / "file" / "history") as talk:
        talk.ready()
        assert any(line.startswith("History is not kept: ") for line in talk.lines)
        assert talk.enter("hello") == ["You said: hello", ""]


# Commands.


def test_help_names_every_command(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        text = "\n".join(talk.enter("/?"))
        for command in ("/?", "/bye", "/clear", "/set", "/show", "/save FILE", "/load FILE", "/stats", '"""'):
            assert command in text
        assert talk.enter("/help") == text.split("\n")
        assert talk.enter("/? set")[0].startswith("  /set NAME VALUE")
        assert talk.enter("/? /show")[0].startswith("  /show info")
        assert talk.enter("/? shortcuts")[-2].startswith("  Ctrl-D")


def test_unknown_commands_are_not_asked(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("/quit") == ["Unknown command '/quit'. Type /? for help."]
        assert talk.enter("/usr/bin is what?") == ["Unknown command '/usr/bin'. Type /? for help."]
        assert talk.enter("/show me") == ["Unknown command '/show me'. Type /? for help."]
        assert not talk.log.exists()


def test_settings_change_what_is_asked(tmp_path: Path) -> None:
    with Talk(tmp_path, temperature=0.5) as talk:
        talk.ready()
        assert talk.enter("/set temperature 0.7") == ["Set temperature to 0.7."]
        assert talk.enter("/set parameter num_predict 9") == ["Set max_tokens to 9."]
        assert talk.enter('/set stop "a b" c') == ["Set stop to 'a b' c."]
        assert talk.enter("/set seed 7") == ["Set seed to 7."]
        assert talk.enter('/set system "Be brief."') == ["Set system message."]
        assert talk.enter("hello")[0] == "You said: hello"
        settings = talk.events("settings")[-1]
        assert [settings[name] for name in ("temperature", "max_tokens", "stop", "seed", "system")] == [
            0.7, 9, ["a b", "c"], 7, "Be brief.",
        ]  # fmt: skip
        assert talk.events("asked")[-1] == [["system", "Be brief."], ["user", "hello"]]
        listed = talk.enter("/set")
        assert [line.split()[0] for line in listed] == [name for name, _, _ in settings_table(ChatSettings(1))]
        assert listed[2].split()[:2] == ["temperature", "0.7"]
        assert talk.enter("/show parameters") == listed
        assert talk.enter("/show system") == ["Be brief."]


def test_thinking_is_shown_before_the_answer_and_kept_apart(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("/set nothink") == ["Set think to false."]
        assert talk.enter("/set think") == ["Set think to true."]
        assert talk.enter("/set reasoning_effort high") == ["Set reasoning_effort to high."]
        assert talk.enter("ponder 2+2") == ["Thinking...", "I add.", "...done thinking.", "", "4", ""]
        assert talk.enter("hello")[0] == "You said: hello"
        assert talk.events("asked")[-1] == [["user", "ponder 2+2"], ["assistant", "4"], ["user", "hello"]]
        assert talk.events("thoughts")[-1] == [None, "I add.", None]
        assert [talk.events("settings")[-1][name] for name in ("think", "reasoning_effort")] == [True, "high"]
        talk.enter(f"/save {tmp_path / 'chat'}")
        assert load_transcript(tmp_path / "chat", ChatSettings(1)).messages[1].thinking == "I add."
        # Nothing was answered yet, so nothing is kept.
        talk.type("wonder\r")
        talk.wait(lambda: talk.lines[-1] == "Why")
        talk.type(CTRL_C)
        talk.ready()
        assert talk.enter("hello")[0] == "You said: hello"
        assert ["user", "wonder"] not in talk.events("asked")[-1]


def test_a_system_message_of_several_lines(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.type('/set system """You are\r')
        talk.wait(lambda: talk.lines[-1] == "...")
        assert talk.enter('"brief""""')[-1] == "Set system message."
        assert talk.enter("/show system") == ["You are", '"brief"']
        talk.enter("hello")
        assert talk.events("asked")[-1][0] == ["system", 'You are\n"brief"']
        assert talk.enter('/set system ""') == ["Removed system message."]
        assert talk.enter("/show system") == ["There is no system message."]
        talk.enter("again")
        assert talk.events("asked")[-1][0] == ["user", "hello"]


@pytest.mark.parametrize(
    "wrong",
    ["temperature hot", "temperature 2.5", "temperature -1", "temperature nan", "top_p -1", "max_tokens 0",
     "max_tokens 1.5", "seed -1", "top_q 1", "temperature", "system", 'stop "a', "repetition_penalty 0",
     "think perhaps", "reasoning_effort huge"],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(tmp_path: Path, wrong: str) -> None:
    name, _, value = wrong.partition(" ")
    with pytest.raises(UsageError) as caught:
        change_setting(ChatSettings(256), name, value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint is None


def test_the_chat_goes_on_after_a_wrong_setting(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("/set temperature hot") == [
            "Error: temperature should be a number, between 0 (greedy) and 2: it is 'hot'"
        ]
        assert talk.enter("/set top_q 1") == ["Error: there is no setting 'top_q': /set lists them"]
        talk.enter("hello")
        assert talk.events("settings")[-1]["temperature"] == 0


def test_stats_show_the_last_answers_speeds(tmp_path: Path) -> None:
    line = "20 prompt tokens at 40.0 tok/s · 3 tokens at 1.0 tok/s · first token"
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("hello") == ["You said: hello", ""]
        shown = talk.enter("/stats")
        assert shown[0] == "Speeds are shown after each answer."
        assert shown[1].startswith(line)
        assert talk.enter("again")[1].startswith(line)
        assert talk.enter("/set quiet") == ["Set 'quiet' mode."]
        assert talk.enter("again") == ["You said: again", ""]
        assert talk.enter("/set verbose") == ["Set 'verbose' mode."]
        assert talk.enter("/stats") == ["Speeds are no longer shown after each answer."]


def test_clear_forgets_what_was_said_but_not_the_settings(tmp_path: Path) -> None:
    with Talk(tmp_path, system="Be brief.", seed=3) as talk:
        talk.ready()
        talk.enter("hello")
        assert talk.enter("/clear") == ["Cleared session context."]
        talk.enter("again")
        assert talk.events("asked")[-1] == [["system", "Be brief."], ["user", "again"]]
        assert talk.events("settings")[-1]["seed"] == 3


def test_show_tells_the_model_and_the_settings(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        info = ["  model     DBRX on 4 hosts", "  messages  0"]
        assert talk.enter("/show info") == info
        assert talk.enter("/show") == info + talk.enter("/set")


def test_an_answer_cut_at_max_tokens_says_so(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("long story")[1] == "[cut after 256 tokens: /set max_tokens 1024 allows more]"


def test_a_saved_chat_goes_on_where_it_was(tmp_path: Path) -> None:
    saved = tmp_path / "a chat.json"
    with Talk(tmp_path, system="Be brief.") as talk:
        talk.ready()
        talk.enter('"""two\rlines"""')
        talk.enter("/set temperature 0.7")
        assert talk.enter('/save "a chat.json"') == ["Saved 2 messages in a chat.json."]
        assert saved.stat().st_mode & 0o777 == 0o600
        talk.enter("more")
        assert talk.enter('/save "a chat.json"') == ["Saved 4 messages in a chat.json."]
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter('/load "a chat.json"') == ["Loaded 4 messages from a chat.json."]
        talk.enter("last")
        assert talk.events("asked")[-1] == [
            ["system", "Be brief."],
            ["user", "two\nlines"],
            ["assistant", "You said: two lines"],
            ["user", "more"],
            ["assistant", "You said: more"],
            ["user", "last"],
        ]
        assert talk.events("settings")[-1]["temperature"] == 0.7


def test_files_that_are_no_chats_are_one_line(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with Talk(tmp_path) as talk:
        talk.ready()
        talk.enter("hello")
        for command in ("/save", "/load", "/save a b"):
            assert talk.enter(command) == [f"Error: one file should be named: {command.split()[0]} FILE"]
        assert talk.enter("/load notes.txt") == ["Error: notes.txt is not a saved chat: not JSON in UTF-8"]
        assert talk.enter("/load none") == ["Error: cannot read none: No such file or directory"]
        assert talk.enter("/load .") == ["Error: cannot read .: not a regular file"]
        assert talk.enter("/load /dev/zero") == ["Error: cannot read /dev/zero: not a regular file"]
        assert talk.enter("/save notes.txt") == ["Error: notes.txt exists and is not a saved chat: choose another name"]
        assert talk.enter("/save x/y") == ["Error: cannot write x/y: No such file or directory"]
        assert other.read_text() == "mine"
        talk.enter("again")
        assert talk.events("asked")[-1][0] == ["user", "hello"]


# Errors, and output that is not to be trusted.


def test_an_error_is_said_and_the_chat_goes_on(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("refuse") == ["Error: the context is full [2J", "Hint: use /clear"]
        assert talk.enter("break") == ["Half", "Error: mac3: rank 2: connection reset", "Hint: moectl logs mac3"]
        talk.enter("hello")
        assert talk.events("asked")[-1] == [["user", "hello"]]


def test_what_the_hint_about_an_answer_that_broke_off_says_is_answered(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        assert talk.enter("cut") == ["You said: cut", "Error: the answer broke off", "Hint: ask again"]
        assert talk.enter("and again")[0] == "You said: and again"


def test_an_answers_control_characters_do_not_drive_the_terminal(tmp_path: Path) -> None:
    with Talk(tmp_path) as talk:
        talk.ready()
        mark = len(talk.sent)
        assert talk.enter("hostile") == ["a␛]0;owned␇b␛[2Jc\ufffd2Jde␈␡f       g", "h", ""]
        answer = talk.sent[mark:].split(b"\x1b[?2004h")[1]
        assert b"\x1b]" not in answer
        assert b"\x1b[2J" not in answer
        assert "\x9b".encode() not in answer
        assert talk.screen.title == ""


def test_redirected_answers_are_bytes_as_they_came(tmp_path: Path) -> None:
    program = f"exec {sys.executable} -m tests.support.chat_program log - > out"
    with Terminal(["sh", "-c", program], tmp_path) as talk:
        talk.wait_for(PROMPT)
        talk.type("hello\rhostile\rforever\r")
        talk.wait(lambda: (tmp_path / "out").read_text().endswith("router is"))
        talk.type(CTRL_C)
        talk.wait_for("^C")
        talk.wait(lambda: talk.lines[-1] == PROMPT)
        talk.type("/set\r/bye\r")
        assert talk.end() == 0
    from tests.support.chat_program import HOSTILE

    expected = f"You said: hello\n{HOSTILE}\nThe router is\n"
    assert (tmp_path / "out").read_bytes().decode() == expected


def test_a_chat_needs_a_terminal(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.support.chat_program", str(tmp_path / "log"), "-"]
    done = subprocess.run(words, input="hello\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Over: a chat needs a terminal\n"


# The grammar and the files, without a terminal.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plain", "plain"),
        ('"""', None),
        ('"""a', None),
        ('"""a"b""', None),
        ('"""a"""', "a"),
        ('"""a\nb"""  ', "a\nb"),
        ('"""\na\n"""', "a"),
        ('"""\n\na\n\n"""', "\na\n"),
        ('""""""', ""),
        ('"""A docstring."""\nimport os', '"""A docstring."""\nimport os'),
        ('ends with """', 'ends with """'),
    ],
)
def test_blocks(text: str, message: str | None) -> None:
    assert read_block(text) == message
    assert is_open(text) == (message is None)


@given(st.text())
def test_any_text_can_be_said_in_a_block(text: str) -> None:
    if '"""' not in text and not text.startswith('"') and not text.endswith('"'):
        assert read_block(f'"""\n{text}\n"""') == text
        assert is_open(f'"""\n{text}')


def test_what_is_a_command() -> None:
    assert all(map(is_command, ("/bye", "/usr is", "/set system x", '/set system """a\nb"""', "/stats\n")))
    assert not any(map(is_command, ("", "bye", " /bye", "/usr\n/bin", '"""/bye"""', "/set stop a\nb")))
    assert is_open('/set parameter system """a\n')
    assert not is_open('/set stop """a')


@given(st.text())
def test_what_is_shown_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in shown if c not in "\n\t")
    assert printable(shown) == shown
    assert [c for c in text if c.isprintable()] == [c for c in shown if c.isprintable() and c in text]


settings = st.builds(
    ChatSettings,
    max_tokens=st.integers(1, 2**31 - 1),
    system=st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=st.integers(0, 10**6),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 10),
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3).map(tuple),
    think=st.none() | st.booleans(),
    reasoning_effort=st.none() | st.sampled_from(EFFORTS[1:]),
)
texts = st.text(st.characters(codec="utf-8"))
exchanges = st.lists(st.tuples(texts, texts, st.sampled_from(["stop", "length", "cancelled"])), max_size=3)
transcripts = st.builds(
    Transcript,
    model=texts,
    settings=settings,
    messages=exchanges.map(
        lambda said: tuple(
            m for q, a, why in said for m in (Message("user", q), Message("assistant", a, why, q or None))
        )
    ),
)


@hypothesis.settings(deadline=None)  # the first chat that is read loads pydantic
@given(transcripts)
def test_a_transcript_survives_its_file(tmp_path_factory: pytest.TempPathFactory, transcript: Transcript) -> None:
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    save_transcript(path, transcript)
    assert load_transcript(path, ChatSettings(1)) == transcript
    assert [p.name for p in path.parent.iterdir()] == ["chat.json"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
nearly = st.fixed_dictionaries(
    {},
    optional={
        "schema": st.just("moectl.chat/1"),
        "model": json_values,
        "settings": json_values
        | st.fixed_dictionaries({}, optional={f: json_values for f in ("seed", "stop", "top_p")}),
        "messages": json_values
        | st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": json_values})),
    },
)


@hypothesis.settings(deadline=None)
@given(st.binary() | (json_values | nearly).map(lambda value: json.dumps(value).encode()))
def test_any_other_file_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    path.write_bytes(data)
    try:
        loaded = load_transcript(path, ChatSettings(1))
    except UsageError as error:
        refusal = error
    else:
        assert json.loads(data)["schema"] == "moectl.chat/1"
        assert len(loaded.messages) == len(json.loads(data)["messages"])
        return
    assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"schema": "moectl.chat/1"}', '{"schema": "moectl.chat/2", "messages": []}',
     '{"schema": "moectl.chat/1", "messages": [], "model": "\\ud800"}',
     '{"schema": "moectl.chat/1", "messages": [{"role": "user", "content": "?"}]}',
     '{"schema": "moectl.chat/1", "messages": [], "settings": {"temperature": "hot"}}'],
)  # fmt: skip
def test_damaged_chats(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat").write_text(text)
    with pytest.raises(UsageError, match="is not a saved chat"):
        load_transcript(tmp_path / "chat", ChatSettings(1))


def test_settings_of_a_chat_are_those_it_names(tmp_path: Path) -> None:
    text = '{"schema": "moectl.chat/1", "messages": [], "settings": {"seed": 3, "later": 1}, "later": 2}'
    (tmp_path / "chat").write_text(text)
    assert load_transcript(tmp_path / "chat", ChatSettings(99, temperature=0.5)).settings == ChatSettings(
        99, temperature=0.5, seed=3
    )


@given(settings, st.sampled_from([name for name, _, _ in settings_table(ChatSettings(1))]))
def test_what_is_listed_can_be_typed(settings: ChatSettings, name: str) -> None:
    value = getattr(settings, name)
    if name == "system" or value == ():
        return
    assert getattr(change_setting(ChatSettings(1), name, value_text(value)), name) == value


@given(st.sampled_from([*ALIASES, "system", *(name for name, _, _ in settings_table(ChatSettings(1)))]), st.text())
def test_any_value_is_read_or_refused(name: str, value: str) -> None:
    with contextlib.suppress(UsageError):
        assert isinstance(change_setting(ChatSettings(1), name, value), ChatSettings)
