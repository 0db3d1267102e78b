"""The verb help: guides in a pager, in a pipe and as JSON, the verbs' own help, and what is no topic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moectl.cli.app import cli
from moectl.cli.guides import TOPICS, read_guide
from tests.support.terminal import Terminal

MODULE = [sys.executable, "-m", "moectl"]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["help", *words], prog_name="moectl")


def test_the_topics_are_listed() -> None:
    done = call()
    assert done.exit_code == 0
    words = " ".join(done.stdout.split())
    for topic in TOPICS:
        assert f" {topic} {read_guide(topic).summary}" in words
    assert "'moectl VERB --help' shows a verb" in words
    assert call("-q").stdout.split() == list(TOPICS)
    document = json.loads(call("--json").stdout)
    assert document["schema"] == "moectl.help/1"
    assert [entry["topic"] for entry in document["topics"]] == list(TOPICS)


@pytest.mark.parametrize("topic", TOPICS)
def test_a_guide_begins_with_what_it_is_for(topic: str) -> None:
    guide = read_guide(topic)
    assert guide.summary.endswith(".")
    assert len(guide.summary) <= 80
    assert not guide.title.endswith(".")


@pytest.mark.parametrize("topic", TOPICS)
def test_a_guide_in_a_pipe_is_markdown_without_marks_and_dead_links(topic: str) -> None:
    text = call(topic).stdout
    assert text.startswith(f"# {read_guide(topic).title}\n\n{read_guide(topic).summary}\n")
    assert "<!--" not in text
    assert ".md)" not in text
    assert "](#" not in text
    assert call(topic, "-q").stdout == text
    document = json.loads(call(topic, "--json").stdout)
    assert document == {"schema": "moectl.help/1", "topic": topic, "text": text.rstrip("\n")}


def test_a_reference_names_the_command_that_shows_it() -> None:
    assert "Verified (moectl help verified) has the details" in call("cluster").stdout
    assert "error numbers |" in call("troubleshooting").stdout


def test_a_verb_is_shown_as_its_own_help_shows_it() -> None:
    shown = subprocess.run([*MODULE, "help", "plan"], capture_output=True, text=True, check=True)
    own = subprocess.run([*MODULE, "plan", "--help"], capture_output=True, text=True, check=True)
    assert shown.stdout == own.stdout
    assert shown.stderr == ""
    assert "Usage: moectl ps " in call("ps").stdout


@pytest.mark.parametrize(
    ("word", "guess"), [("dayly", "'daily'"), ("statsu", "'status'"), ("trouble-shooting", "'troubleshooting'")]
)
def test_an_unknown_topic_is_a_usage_error(word: str, guess: str) -> None:
    done = call(word)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"No such topic or verb '{word}'. Did you mean {guess}?" in done.stderr
    assert "Did you mean" not in call("xyzzy").stderr
    failed = subprocess.run([*MODULE, "help", word, "--json"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert json.loads(failed.stderr)["error"]["kind"] == "UsageError"


@pytest.mark.parametrize("pager", ["less", "cat"])
def test_a_guide_on_a_terminal(pager: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(pager) is None:
        pytest.skip(f"{pager} is not installed")
    monkeypatch.setenv("PAGER", pager)
    monkeypatch.delenv("LESS", raising=False)
    with Terminal([*MODULE, "help", "planning"], tmp_path) as terminal:
        if pager == "less":
            terminal.wait_for("Find out whether a model fits")
            terminal.type("/Ways to split\r")
            terminal.wait_for("a slice of every")
            terminal.type("q")
        assert terminal.end() == 0
    text = terminal.sent.decode()
    assert ("\x1b[1mmoectl plan\x1b[" in text) == (pager == "less")  # cat does not say whether it shows them
    assert "moectl plan" in text
    assert "ESC" not in text
    assert "`" not in text
    assert "|---" not in text


@pytest.mark.parametrize("topic", TOPICS)
def test_a_guide_without_colour_has_no_escapes(topic: str) -> None:
    from moectl.cli.verbs.help import _render

    shown = _render(read_guide(topic).text("moectl help {}"), color=False)
    assert "\x1b" not in shown
    assert "|--" not in shown
    assert "**" not in shown
