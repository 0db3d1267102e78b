"""The man pages: those committed are those that the verbs give, they are clean roff, and a wheel puts them in place."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import moectl
from moectl.cli.app import cli
from moectl.cli.completion import FILES
from moectl.cli.guides import TOPICS
from moectl.cli.manual import _CODES, _HOST_KEYS, pages, write_files
from moectl.cli.options import common
from moectl.cli.roff import NEEDS_TBL, to_roff
from moectl.cli.verb import EXIT_CODES, Verb, Verbs, verb
from moectl.errors import MoectlError
from moectl.hosts import hostfile

ROOT = Path(__file__).parent.parent.parent
GUIDE_SECTIONS = ["NAME", "DESCRIPTION", "SEE ALSO"]
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "ENVIRONMENT", "FILES", "EXIT STATUS", "SEE ALSO"]
REGENERATE = "run: python -m moectl generate --man man --completions completions"


def visible() -> list[Verb]:
    return [command for command in cli.commands.values() if isinstance(command, Verb) and not command.hidden]


def mandoc(*words: str, source: str | None = None) -> str:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", *words], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.sub(".\b", "", done.stdout)  # bold is a letter printed twice


def test_the_committed_pages_are_those_that_the_verbs_give() -> None:
    committed = {str(path.relative_to(ROOT / "man")): path.read_text() for path in (ROOT / "man").glob("*/*")}
    assert committed == pages(cli), REGENERATE


def test_generate_writes_what_is_committed_wherever_it_runs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moectl", "generate", "--man", "m", "--completions", "c"]
    surroundings = {"COLUMNS": "40", "LC_ALL": "C", "TZ": "Asia/Tokyo", "PYTHONPATH": str(ROOT)}
    subprocess.run(words, cwd=tmp_path, env=surroundings, check=True, capture_output=True)
    for made, kept in (("m", "man"), ("c", "completions")):
        done = subprocess.run(
            ["diff", "-r", str(tmp_path / made), str(ROOT / kept)], capture_output=True, text=True, check=False
        )
        assert done.stdout + done.stderr == "", REGENERATE


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MoectlError, match="Not a directory"):
        write_files(tmp_path / "file", {"man1/x.1": "x"})


def test_every_visible_verb_has_a_page_and_no_other_has_one() -> None:
    names = {f"man1/moectl-{name}.1" for name, command in cli.commands.items() if not command.hidden}
    names |= {f"man7/moectl-{topic}.7" for topic in TOPICS}
    assert set(pages(cli)) == names | {"man1/moectl.1", "man5/moectl-hosts.5"}


@pytest.mark.parametrize("name", sorted(pages(cli)))
def test_a_page_has_its_sections_and_is_clean(name: str) -> None:
    text = pages(cli)[name]
    if text.startswith(".so "):
        assert text.split()[1] in pages(cli)
        return
    found = re.findall(r"^\.SH (.*)$", text, re.MULTILINE)
    sections = GUIDE_SECTIONS if name.startswith("man7/") else SECTIONS
    assert [section for section in found if section in sections] == sections
    title = text.removeprefix(f"{NEEDS_TBL}\n").splitlines()[0]
    assert title.startswith(".TH ")
    assert f' {moectl.__date__} "moectl {moectl.__version__}"' in title
    assert mandoc("-Tlint", "-Wwarning", str(ROOT / "man" / name)) == ""


@pytest.mark.parametrize("command", visible(), ids=lambda command: command.name)
def test_a_page_says_what_help_says(command: Verb) -> None:
    shown = mandoc("-Tascii", source=pages(cli)[f"man1/moectl-{command.name}.1"])
    words = " ".join(shown.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{command.name}: {parameter.opts} needs help="
            assert ", ".join(sorted(parameter.opts, key=len)) in words
    assert command.examples, f"{command.name}: add a block of Examples to its docstring"
    for example in command.examples:
        assert example in shown
    for code in EXIT_CODES:
        assert re.search(rf"^ +{code}  ", shown, re.MULTILINE)
    assert "--help" in words


def test_both_tables_of_exit_codes_have_every_code_of_an_error() -> None:
    def kinds(kind: type[MoectlError]) -> Iterator[type[MoectlError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from kinds(below)

    assert {kind.exit_code for kind in kinds(MoectlError)} | {0, 130, 141, 143} == set(EXIT_CODES) == set(_CODES)


def test_moectl_hosts_names_every_key() -> None:
    assert {entry.name.partition("=")[0] for entry in _HOST_KEYS} == set(hostfile.KEYS)


def test_the_example_of_moectl_hosts_is_a_hosts_file() -> None:
    page = mandoc("-Tascii", source=pages(cli)["man5/moectl-hosts.5"])
    example = page.split("EXAMPLES\n")[1].split("\nENVIRONMENT")[0]
    found = hostfile.parse_hosts(example).hosts
    assert [host.address for host in found] == ["mac1", "mac2", "ada@mac3.local:2222", "mac4"]


def test_odd_letters_and_aliases_come_out_right() -> None:
    @click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
    def tree() -> None:
        """Do things."""

    @verb("Observe")
    @click.argument("name", nargs=-1)
    @click.option("--size", type=click.IntRange(1, 8), default=2, show_default=True, help=".hidden-file and 'x\\y'.")
    @common
    def show() -> None:
        """Show a \\backslash, an em—dash and well-known words.

        .dots and 'quotes begin lines.

        \b
        kept
          as it is

        \b
        Examples:
          moectl show 'it^s' `x` --size 3
        """

    tree.add_command(show)
    tree.add_command(show, "ps")
    made = pages(tree)
    assert made["man1/moectl-ps.1"] == ".so man1/moectl-show.1\n"
    source = made["man1/moectl-show.1"]
    assert mandoc("-Tlint", "-Wwarning", source=source) == ""
    assert all(letter.isascii() for letter in source)
    shown = mandoc("-Tutf8", source=source)
    for line in (
        "moectl show [OPTION]... [NAME]...",
        "Show a \\backslash, an em—dash and well-known words.",
        ".dots and 'quotes begin lines.",
        "kept\n             as it is",
        ".hidden-file and 'x\\y'. At least 1, at most 8. Default: 2.",
        "moectl show 'it^s' `x` --size 3",
    ):
        assert line in shown or line in re.sub(r" +", " ", shown), line
    main = mandoc("-Tutf8", source=made["man1/moectl.1"])
    assert "moectl show, ps" in main
    help_ = CliRunner().invoke(tree, ["--help"]).output
    assert "  show  Show a \\backslash, an em—dash and well-known words. (alias: ps)\n" in help_


GUIDE = """\
Two *odd* letters: `'a'` and `b\\\\c`.
.dots begin a line. **So does `-x`.**

- one, at <https://example.org/a-b>
- `two`

1. first
2. second

```sh
  .kept --as "it is"   # well
```

### Part two

| short | a column of long texts |
|---|---|
| `-a` | .one cell that is wider than all others, so that it has to wrap at the end of the line |
| | the 'end' |
"""


def test_a_guide_in_markdown_comes_out_right() -> None:
    head = [NEEDS_TBL, f'.TH X 7 {moectl.__date__} "x" "x"', ".SH NAME", r"x \- y", ".SH A"]
    source = "\n".join([*head, *to_roff(GUIDE)]) + "\n"
    assert all(letter.isascii() for letter in source)
    assert mandoc("-Tlint", "-Wwarning", source=source) == ""
    shown = mandoc("-Tutf8", source=source)
    words = " ".join(shown.split())
    for text in (
        "Two odd letters: 'a' and b\\\\c. .dots begin a line. So does -x.",
        "one, at https://example.org/a-b",
        "2. second",
        "Part two",
        "-a .one cell that is wider",
        "the 'end'",
    ):
        assert text in words
    assert '  .kept --as "it is"   # well\n' in shown


@pytest.mark.parametrize("text", ["> quoted", "![picture](x.png)", "<b>html</b>", "- a\n\n  > b", "- a\n\n      b"])
def test_what_no_page_can_show_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no guide may hold"):
        to_roff(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and a source distribution of this tree."""
    directory = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(directory)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    return directory


def test_a_wheel_installs_pages_and_scripts_where_they_are_looked_for(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (data,) = tmp_path.glob("*.data/data/share")
    found = {str(path.relative_to(data)): path.read_text() for path in data.rglob("*") if path.is_file()}
    wanted = {f"man/{name}": text for name, text in pages(cli).items()}
    places = {
        "bash": "bash-completion/completions/moectl",
        "zsh": "zsh/site-functions/_moectl",
        "fish": "fish/vendor_completions.d/moectl.fish",
    }
    wanted |= {place: (ROOT / "completions" / FILES[shell]).read_text() for shell, place in places.items()}
    assert found == wanted
    assert wheel.stat().st_size <= 10_000_000


def test_a_source_distribution_holds_them(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"man/{name}" for name in pages(cli)} | {f"completions/{name}" for name in FILES.values()} <= names
