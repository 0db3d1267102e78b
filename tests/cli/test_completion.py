"""Tab: what is offered, and one real completion after another in real bash, zsh and fish behind a pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from moectl.cli.app import cli
from moectl.cli.completion import FILES, SHELLS, script
from moectl.hosts.hostfile import Host
from moectl.model.catalog import MODELS
from moectl.paths import config_dir, data_dir
from moectl.planner.chips import CHIPS
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from tests.support.terminal import Terminal

ROOT = Path(__file__).parent.parent.parent
COMPLETIONS = ROOT / "completions"
COMPINIT = "autoload -Uz compinit; compinit -u -D"

HOSTS = "alpha ip=10.0.0.1\nada@beta.local:2222 ip=10.0.0.2\ngamma ip=10.0.0.3\n"

Offer = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two hosts files, one of them in force, and a shard set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.txt").write_text(HOSTS)
    (tmp_path / "other-hosts.txt").write_text("delta\nepsilon\n")
    (tmp_path / "some-directory").mkdir()
    shards = data_dir() / "shards" / "tiny-bf16-hidden-2"
    shards.mkdir(parents=True)
    (shards / "moectl.json").write_text("{}")
    (shards.parent / "unfinished").mkdir()
    return tmp_path


def ask(shell: str, line: str, word: str = "") -> str:
    """Return what moectl answers a shell's script; it may say nothing besides."""
    asked = {"_MOECTL_COMPLETE": f"{shell}_complete", "COMP_LINE": line, "COMP_POINT": "999", "COMP_WORD": word}
    words = ["env", *(f"{k}={v}" for k, v in asked.items()), sys.executable, "-m", "moectl"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    assert not done.stderr
    return done.stdout


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Return what is offered for a line, as values, in this process."""

    def offered(line: str, shell: str = "zsh") -> list[str]:
        monkeypatch.setenv("COMP_LINE", f"moectl {line}")
        complete = SHELLS[shell](cli, {}, "moectl", "_MOECTL_COMPLETE")
        lines = [row.split("\t") for row in complete.complete().splitlines()]
        return [row[1] if row[0] == "plain" else f"<{row[0]}>" for row in lines]

    return offered


@pytest.mark.parametrize("shell", sorted(FILES))
def test_the_committed_scripts_are_those_that_moectl_prints(shell: str) -> None:
    assert (COMPLETIONS / FILES[shell]).read_text() == script(shell)
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "completion", shell], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == (script(shell), "")


def test_a_script_as_json() -> None:
    words = [sys.executable, "-m", "moectl", "completion", "zsh", "--json"]
    document = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert document == {"schema": "moectl.completion/1", "shell": "zsh", "script": script("zsh")}


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("pl", ["plan"]),
        ("wor", []),  # hidden
        ("deploy --on", ["--only"]),
        ("deploy --only ", ["alpha", "beta.local", "gamma"]),
        ("deploy --only alpha --only ", ["beta.local", "gamma"]),
        ("deploy other-hosts.txt --only ", ["delta", "epsilon"]),
        ("deploy --hostfile other-hosts.txt --only d", ["delta"]),
        ("deploy --hosts one,two --only ", ["one", "two"]),
        ("deploy --hostfile - --only ", []),
        ("run --hosts ", ["alpha", "ada@beta.local:2222", "gamma"]),
        ("run --hosts alpha,", ["alpha,ada@beta.local:2222", "alpha,gamma"]),
        ("run --hosts=gamma,al", ["gamma,alpha"]),
        ("run --shards ", ["tiny-bf16-hidden-2"]),
        ("run --shards nothing-like-it", ["<dir>"]),
        ("run --model mlx-", [name for name in MODELS if name.startswith("mlx-")]),
        ("run --model ./", ["<dir>"]),
        ("shard ", list(MODELS)),
        ("plan --chip m2", [name for name in CHIPS if name.startswith("m2")]),
        ("plan --link ", ["rdma", "tb-tcp", "10gbe", "1gbe"]),
        ("plan --split=h", ["hidden"]),
        ("hosts --color ", ["auto", "always", "never"]),
        ("deploy ", ["<file>"]),
        ("hosts --hostfile ", ["<file>"]),
        ("shard --verify ", ["<dir>"]),
        ("shard -o ", ["<dir>"]),
        ("completion ", ["bash", "zsh", "fish"]),
        ("help s", ["scripting", "security", "setup", "shard", "serve", "stop", "service", "status", "show"]),
        ("help wor", []),  # hidden
        ("run 'an open quotation", []),
    ],
)
def test_what_is_offered(line: str, values: list[str], offer: Offer) -> None:
    assert offer(line) == values


def test_hosts_come_from_the_deployment_where_no_file_names_them(here: Path, offer: Offer) -> None:
    (here / "hosts.txt").unlink()
    assert offer("deploy --only ") == []
    ranks = tuple(DeployedRank(Host(name), "python", "root", "directory") for name in ("mac1", "mac2"))
    write_deployment(Deployment("tiny", "shards", ranks))
    assert offer("deploy --only ") == ["mac1", "mac2"]
    (here / "hosts.txt").write_text("broken file=here\n")
    assert offer("deploy --only ") == []


def test_a_hosts_file_that_would_be_waited_for_is_not_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(here / "pipe")
    assert ask("zsh", "moectl deploy --hostfile pipe --only ") == "\n"
    monkeypatch.setenv("MOECTL_HOSTFILE", "pipe")
    assert ask("zsh", "moectl deploy --only ") == "\n"


def test_the_deployed_shard_set_is_offered_wherever_it_is(here: Path, offer: Offer) -> None:
    ranks = (DeployedRank(Host("mac1")),)
    write_deployment(Deployment("elsewhere", str(here / "elsewhere"), ranks))
    assert offer("run --shards ") == ["tiny-bf16-hidden-2", str(here / "elsewhere")]
    write_deployment(Deployment("tiny-bf16-hidden-2", str(data_dir() / "shards" / "tiny-bf16-hidden-2"), ranks))
    assert offer("run --shards ") == ["tiny-bf16-hidden-2"]


def test_one_name_with_two_ports_is_offered_with_its_ports(here: Path, offer: Offer) -> None:
    (here / "hosts.txt").write_text("mac:22\nmac:23\nother:24\n")
    assert offer("deploy --only ") == ["mac:22", "mac:23", "other"]


def test_the_configuration_names_the_hosts_file(here: Path) -> None:
    (here / "moectl.toml").write_text('hostfile = "other-hosts.txt"\n')
    assert ask("fish", "moectl deploy --only ") == "plain\tdelta\t\nplain\tepsilon\t\n"


def test_what_is_broken_offers_what_it_can_and_says_nothing(here: Path) -> None:
    (here / "moectl.toml").write_text("not toml")
    assert ask("zsh", "moectl deploy --only g") == "plain\tgamma\t\n"
    (config_dir()).mkdir(parents=True)
    (config_dir() / "config.toml").write_bytes(b"\xff")
    assert ask("zsh", "moectl deploy --only g") == "plain\tgamma\t\n"
    assert ask("nosuch", "moectl deploy --only g") == ""


@pytest.mark.parametrize(
    ("typed", "word", "offered"),
    [
        ("--split=hi", "hi", ["hidden"]),  # readline breaks words at =
        ("--split=hi", "--split=hi", ["--split=hidden"]),  # COMP_WORDBREAKS without =
        ("--split=", "", ["auto", "experts", "hidden", "tensor", "layers"]),
        ("--hosts ada@be", "be", ["beta.local:2222"]),
        ("--hosts ada@beta.local:2", "2", ["2222"]),
    ],
)
def test_bash_gets_what_it_has_not_got(typed: str, word: str, offered: list[str]) -> None:
    rows = ask("bash", f"moectl plan {typed}", word).splitlines()
    assert [row.split("\t")[1] for row in rows] == offered


def test_bash_gets_odd_names_quoted() -> None:
    (data_dir() / "shards" / "with space").mkdir()
    (data_dir() / "shards" / "with space" / "moectl.json").write_text("{}")
    assert ask("bash", "moectl run --shards w", "w") == "plain\t'with space'\t\n"
    assert ask("zsh", "moectl run --shards w") == "plain\twith space\t\n"


def test_names_that_a_terminal_would_obey_are_not_offered(offer: Offer) -> None:
    for name in ("evil\x1b[2J", "evil\nplain\tx"):
        (data_dir() / "shards" / name).mkdir()
        (data_dir() / "shards" / name / "moectl.json").write_text("{}")
    assert offer("run --shards ") == ["tiny-bf16-hidden-2"]


def test_what_names_files_hosts_or_models_has_offers() -> None:
    """So that a new verb is not forgotten: the placeholder tells what a value is."""
    for verb in cli.commands.values():
        for parameter in verb.params:
            name = parameter.name if isinstance(parameter, click.Argument) else None
            placeholder = (parameter.metavar or name or "").strip("[].").upper()
            if verb.hidden or placeholder not in (
                "FILE",
                "DIR",
                "HOST",
                "HOSTS",
                "HOSTFILE",
                "DIR|REPO",
                "LIST",
                "MODEL",
            ):
                continue
            offers = parameter._custom_shell_complete is not None or isinstance(parameter.type, click.Path)
            assert offers, f"{verb.name}: {parameter.name} needs shell_complete=suggest.…"


# The scripts, as their shells' own tools see them.


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("shellcheck", "moectl.bash"),
        ("bash", "-n", "moectl.bash"),
        ("zsh", "-n", "_moectl"),
        ("fish", "-n", "moectl.fish"),
    ],
)
def test_the_scripts_are_clean(words: tuple[str, ...]) -> None:
    done = subprocess.run([tool(words[0]), *words[1:]], cwd=COMPLETIONS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


NEWER_THAN_BASH_3_2 = re.compile(
    r"""
    \b(?:declare|local|typeset)\s+-\w*[Angulc]      # associative arrays, names of names, global, case
    | \b(?:mapfile|readarray|coproc|wait\s+-n)\b
    | \$\{\w+(?:\[[^\]]*\])?(?:\^|,|@[A-Za-z])       # case, ${x@Q}
    | \$\{[^}]*:\s-\d | \[-\d                        # from the end
    | &>> | \|& | ;;?& | \[\[?\s+-[vR]\s
    | printf\s+-v\s+\w+\[ | printf[^\n]*%\(
    | \{\d+\.\.\d+\.\.                                # steps
    | \bread\s[^\n|;]*-(?:N|i)\b | \bread\s[^\n|;]*-t\s*[\d.]*\.
    | \bglobstar\b | \bBASHPID\b | \\u[0-9a-fA-F] | \\U
    """,
    re.VERBOSE,
)


@pytest.mark.parametrize(
    "line", ["declare -A x", "local -n y=x", "mapfile -t x", "${x^^}", "${x@Q}", "x &>> y", "[[ -v x ]]", "${x[-1]}"]
)
def test_the_search_for_newer_constructs_finds_them(line: str) -> None:
    assert NEWER_THAN_BASH_3_2.search(line)


def test_the_bash_script_needs_nothing_newer_than_3_2_unguarded() -> None:
    text = script("bash")
    assert not NEWER_THAN_BASH_3_2.search(text)
    # What 3.2 lacks, compopt and nosort, stands behind a question whether it is there.
    for number, line in enumerate(lines := text.splitlines()):
        if re.search(r"\bcompopt -", line):
            assert "if type compopt" in lines[number - 1]
        if "nosort" in line:
            assert line.lstrip().startswith("elif ! complete -o nosort")


@pytest.mark.parametrize(
    "program",
    [f"fpath=({COMPLETIONS} $fpath); {COMPINIT}", f"{COMPINIT}; source {COMPLETIONS}/_moectl"],
    ids=["in fpath", "sourced"],
)
def test_compinit_finds_the_function(program: str) -> None:
    program += "; print -r -- $_comps[moectl]"
    done = subprocess.run([tool("zsh"), "-f", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("_moectl\n", "")


# Real shells. A `$ ` is the prompt; what stands behind it is the line as the shell shows it.

BASH_RC = f"PS1='$ '; source '{COMPLETIONS / 'moectl.bash'}'\n"
# Not 3.2 itself, but without the builtins and the option that it lacks, and answering as it does to those.
BASH_3_RC = f"""\
enable -n compopt mapfile readarray
BASH_COMPAT=3.2
complete() {{
    if [[ " $* " == *" nosort "* ]]; then echo "complete: nosort: invalid option name" >&2; return 1; fi
    builtin complete "$@"
}}
{BASH_RC}"""
ZSH_RC = f"PS1='$ '; fpath=('{COMPLETIONS}' $fpath); {COMPINIT}\n"
FISH_RC = (
    "set -g fish_autosuggestion_enabled 0; set -g fish_greeting; function fish_prompt; echo -n '$ '; end; "
    f"source '{COMPLETIONS / 'moectl.fish'}'"
)


@pytest.fixture
def path(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This moectl is the one on the PATH."""
    program = here / "bin" / "moectl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moectl "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")


def start(shell: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    home = here / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("INPUTRC", "/dev/null")
    if shell.startswith("bash"):
        (home / "rc").write_text(BASH_3_RC if shell == "bash without compopt" else BASH_RC)
        return [tool("bash"), "--noprofile", "--rcfile", str(home / "rc"), "-i"]
    if shell == "zsh":
        monkeypatch.setenv("ZDOTDIR", str(home))
        (home / ".zshrc").write_text(ZSH_RC)
        return [tool("zsh"), "-d", "-i"]
    return [tool("fish"), "--no-config", "--interactive", "--init-command", FISH_RC]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("shell", ["bash", "bash without compopt", "zsh", "fish"])
def test_real_completions(shell: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = start(shell, here, monkeypatch)
    with Terminal(argv, here) as terminal:
        terminal.wait(lambda: terminal.lines[-1] == "$")
        for typed, completed in [
            ("moectl dep", "moectl deploy"),
            ("moectl deploy --only al", "moectl deploy --only alpha"),
            (
                "moectl deploy --verify other-hosts.txt --only ep",
                "moectl deploy --verify other-hosts.txt --only epsilon",
            ),
            ("moectl deploy oth", "moectl deploy other-hosts.txt"),
            ("moectl hosts --hostfile=oth", "moectl hosts --hostfile=other-hosts.txt"),
            ("moectl plan --split=hi", "moectl plan --split=hidden"),
            ("moectl run --hosts alpha,ada@be", "moectl run --hosts alpha,ada@beta.local:2222"),
            ("moectl run --sha", "moectl run --shar"),  # --shards or --shares
            ("moectl run --shards ti", "moectl run --shards tiny-bf16-hidden-2"),
            ("moectl shard --verify some", "moectl shard --verify some-directory/"),
            ("A=1 moectl completion f", "A=1 moectl completion fish"),
        ]:
            terminal.type(f"{typed}\t")
            terminal.wait(lambda wanted=f"$ {completed}": terminal.lines[-1] == wanted)  # type: ignore[misc]
            terminal.type("\x15")  # Ctrl-U empties the line
            terminal.wait(lambda: terminal.lines[-1] == "$")
        terminal.type("moectl deploy --only \t\t")
        terminal.wait(lambda: any(re.search(r"alpha +beta.local +gamma", line) for line in terminal.screen.display))
