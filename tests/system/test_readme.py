"""README and guides against what is there: their marked transcripts are run, all that they name is looked up.

A fenced block after `<!-- run -->` is run as a person types it, in an empty home and directory; after
`<!-- run with NAME -->` beside the file that a block after `<!-- file: NAME -->` shows; after
`<!-- run in the clone -->` where the demo is. In what is expected `…` stands for what varies, on a line of its own for
any number of lines.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from moectl.cli.app import cli
from moectl.cli.guides import DIRECTORY, TOPICS
from moectl.cluster.doctor.errnos import explain, find_error
from tests.support import hardware_table
from tests.support.ring import process_env

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "moectl"
README = ROOT / "README.md"
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, *(DIRECTORY / f"{topic}.md" for topic in TOPICS))}
_FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?(?P<pad> *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S)
_MARK = "---8<---"
# As typed: with this interpreter, without what the current directory holds, both streams as at a terminal.
_PREAMBLE = 'moectl() { "$PYTHON" -P -m moectl "$@"; }\nexec 2>&1 < /dev/null\n'


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return the mark and the text of each fenced block of a kind."""
    found = [block for text in PAGES.values() for block in _FENCE.finditer(text)]
    return [(block["mark"] or "", block["text"]) for block in found if block["kind"] == kind]


def prose(*pages: Path) -> str:
    """Return pages, or all of them, without their fenced blocks."""
    return "\n".join(_FENCE.sub("", PAGES[page]) for page in pages or PAGES)


def code_lines() -> Iterator[str]:
    """Yield what the pages show as typed: spans, lines of sh blocks, commands of transcripts."""
    yield from re.findall(r"`([^`\n]+)`", prose())
    for _, text in blocks("sh"):
        yield from (line.partition(" #")[0].strip() for line in text.splitlines())
    for _, text in blocks("console"):
        yield from (line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ "))


TRANSCRIPTS = [(mark, text) for mark, text in blocks("console") if mark.startswith("run")]
FILES = {mark.removeprefix("file: "): text for mark, text in blocks("text") if mark.startswith("file: ")}


# --- What is where.


def test_the_readme_is_short() -> None:
    assert len(PAGES[README].splitlines()) <= 200


def test_every_topic_has_a_guide_and_the_readme_leads_to_it() -> None:
    assert sorted(path.stem for path in DIRECTORY.iterdir()) == sorted(TOPICS)
    assert re.findall(r"^\| \[`(\w+)`\]\(moectl/guide/\1\.md\) \|", PAGES[README], re.M) == list(TOPICS)


def test_the_two_commands_are_those_of_the_ci() -> None:
    [text] = [text for _, text in blocks("sh") if text.startswith("pip install . ")]
    first, second = (line.partition("  ")[0] for line in text.splitlines())
    assert first == 'pip install . && moectl run "What is expert parallelism?"'
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == second


def test_the_readme_says_that_no_mac_was_used() -> None:
    assert "has never been run on a Mac" in PAGES[README]


def test_the_glossary_is_short() -> None:
    table = PAGES[DIRECTORY / "contributing.md"].partition("## Glossary\n\n")[2].partition("\n\n")[0]
    words = [word for row in table.splitlines()[2:] for word in row.split(" | ")[0].strip("| ").split(", ")]
    assert 20 <= len(words) <= 25
    assert len(words) == len(set(words))


def test_a_file_is_the_same_on_every_page() -> None:
    shown = [(mark, text) for mark, text in blocks("text") if mark.startswith("file: ")]
    assert len({mark for mark, _ in shown}) == len(set(shown))


# --- Transcripts.


def _steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a transcript with the output that is expected."""
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def _pattern(output: str) -> str:
    return "".join(
        r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in output.splitlines()
    )


@pytest.mark.parametrize(("mark", "text"), TRANSCRIPTS, ids=[text.splitlines()[0][2:] for _, text in TRANSCRIPTS])
def test_transcript(mark: str, text: str, tmp_path: Path) -> None:
    if mark == "run in the clone":
        (tmp_path / "moectl").mkdir()
        (tmp_path / "moectl" / "demo").symlink_to(PACKAGE / "demo")
    elif mark != "run":
        name = mark.removeprefix("run with ")
        (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    steps = list(_steps(text))
    script = _PREAMBLE + "".join(f"{command}\necho '{_MARK}'\n" for command, _ in steps)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = process_env(HOME=str(tmp_path), PYTHON=sys.executable, PYTHONPATH=path, COLUMNS="100")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
    outputs = done.stdout.split(f"{_MARK}\n")[:-1]
    assert len(outputs) == len(steps), done.stderr
    for (command, expected), output in zip(steps, outputs, strict=True):
        assert re.fullmatch(_pattern(expected), output), f"$ {command}\n{output}"


def test_there_are_transcripts_to_run() -> None:
    assert len(TRANSCRIPTS) >= 6
    assert sum(len(list(_steps(text))) for _, text in TRANSCRIPTS) >= 9


@pytest.mark.parametrize(
    ("expected", "output", "matches"),
    [
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a…c\n", "a b c\n", True),
        ("a…c\n", "a\nc\n", False),
        ("…\nb\n", "1\n2\nb\n", True),
        ("…\nb\n", "b\n", True),
        ("a.c\n", "abc\n", False),
    ],
)
def test_wildcards(expected: str, output: str, *, matches: bool) -> None:
    assert (re.fullmatch(_pattern(expected), output) is not None) == matches


# --- Verbs and flags.

VERBS = {name: command for name, command in cli.commands.items()} | {"ps": cli.commands["status"]}


def _flags(command: click.Command) -> set[str]:
    named = (param for param in command.params if isinstance(param, click.Option))
    return {"--help", "-h"} | {flag for param in named for flag in (*param.opts, *param.secondary_opts)}


# Words of other programs that stand alone in a code span.
FOREIGN = {"--require-hashes", "--no-index"}


def _commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each moectl command in a line of code."""
    for part in re.split(r"&&|[;|]|\$\(|<\(", line):
        words = part.replace('"', " ").split()
        for start in ([index for index, word in enumerate(words) if word == "moectl"] or [len(words)])[:1]:
            if start < len(words):
                yield words[start + 1 :]


def test_every_verb_exists() -> None:
    named = {words[0] for line in code_lines() for words in _commands(line) if words}
    assert {name for name in named if name[0].islower()} - set(VERBS) == set()
    shown = {name for name, command in VERBS.items() if not command.hidden}
    assert shown - named == set(), "verbs that no page names"


def test_every_flag_of_a_command_exists() -> None:
    wrong, count = [], 0
    for line in code_lines():
        for words in _commands(line):
            known = _flags(VERBS.get(words[0] if words else "", cli))
            flags = [match[0] for word in words if (match := re.match(r"--?[a-z][a-z-]*", word))]
            wrong += [f"{flag} in {line}" for flag in flags if flag not in known]
            count += len(flags)
    assert count > 30
    assert wrong == []


def test_every_lone_flag_exists() -> None:
    known = set().union(*map(_flags, VERBS.values())) | _flags(cli) | FOREIGN
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose()) if span.startswith("-")]
    assert len(spans) > 30
    assert [span for span in spans if shlex.split(span)[0].partition("=")[0] not in {*known, "-"}] == []


def test_every_flag_of_pytest_exists() -> None:
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    flags = {flag for line in code_lines() if line.startswith("pytest") for flag in re.findall(r"--[a-z-]+", line)}
    assert flags
    assert [flag for flag in flags if f'"{flag}"' not in conftest] == []


# --- Files, links, schemas.


def test_every_file_exists() -> None:
    found = {path for line in code_lines() for path in re.findall(r"(?<![\w/.])(?:moectl|tests)/[\w./-]+\.\w+", line)}
    assert len(found) > 5
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []
    modules = {name for line in code_lines() for name in re.findall(r"python -m ((?:tests|moectl)\.[\w.]+\w)", line)}
    assert modules
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def _anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def _headings(page: Path) -> list[str]:
    return [_anchor(text) for text in re.findall(r"^#{1,6} (.*)$", prose(page), re.M)]


def _links(page: Path) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    headings = _headings(page)
    assert len(headings) == len(set(headings)), "two headings of one name"
    for link in _links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in _headings(target), link
        assert page == README or target in PAGES, f"{link}: a guide that is a man page can lead to guides only"


def test_there_are_links() -> None:
    assert sum(len(_links(page)) for page in PAGES) > 20


@cache
def _texts() -> tuple[str, ...]:
    """Return every text of the package's code; what a format string fills in is a NUL."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def _rows(mark: str) -> list[list[str]]:
    """Return the cells of the table after a mark, without its head."""
    [text] = [text for text in PAGES.values() if f"<!-- {mark} -->\n" in text]
    table = text.partition(f"<!-- {mark} -->\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


MESSAGES = [row[0].strip("` |") for row in _rows("messages")]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_of_ours(message: str) -> None:
    pieces = [piece for piece in message.split("…") if piece.strip(" :,.()")]
    assert pieces
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.S)
    assert any(pattern.search(text) for text in _texts()), pieces


def test_the_table_of_messages_is_read() -> None:
    assert len(MESSAGES) > 30


def test_every_error_number_is_explained() -> None:
    numbers = [int(text) for row in _rows("numbers") for text in row[0].split(", ")]
    assert len(numbers) >= 6
    for number in numbers:
        name = find_error(f"errno {number}", macos=True)
        assert name is not None
        assert explain(name, macos=True) is not None


def test_every_schema_is_one_of_ours() -> None:
    named = set(re.findall(r"`(moectl\.[a-z-]+/\d+)`", prose()))
    assert len(named) > 15
    assert named - set(_texts()) == set()


# --- What the guide promises of hardware.


def test_the_table_of_machines_is_what_plan_says() -> None:
    drawn = hardware_table.GUIDE.read_text().partition(hardware_table.BEGIN)[2].partition(hardware_table.END)[0]
    assert drawn == hardware_table.draw(), "draw it again: python -m tests.support.hardware_table"
