"""The command line itself: help, exit codes, errors as text and JSON, configuration. The verbs are tested elsewhere."""

from __future__ import annotations

import errno
import io
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest

from moectl import __main__, __version__, errors
from moectl.cli import app as cli
from moectl.cli.options import Failed
from moectl.cli.progress import progress
from moectl.cli.verb import SECTIONS, Verb
from moectl.text import colour_wanted, size_text, table_text, time_text
from tests.support.tiny import write_checkpoint, write_words

MODULE = [sys.executable, "-m", "moectl"]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["moectl", *words])
    monkeypatch.setattr(sys, "stdin", None)
    code = __main__.run()
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(capsys, monkeypatch, *words)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_words(write_checkpoint(tmp_path / "tiny"))


@pytest.mark.parametrize("command", sorted(cli.cli.commands))
def test_every_command_has_help(command: str, call: Any) -> None:
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: moectl {command}")
    assert isinstance(cli.cli.commands[command], Verb), f"make {command} with @verb, for its examples"
    assert len(call(command, "--help")[1].splitlines()) <= 40
    assert "<=x" not in out
    assert "Exit status" not in out
    if not cli.cli.commands[command].hidden:
        assert re.search(rf"\nExamples:\n(?:  .*\n)*  .*moectl {command}", out)
        for flag in ("--hosts", "--hostfile", "--json", "--quiet", "--verbose", "--help-all"):
            assert flag in out


def test_version_and_module() -> None:
    done = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, check=True)
    packages = [f"{name} {metadata.version(name)}" for name in ("mlx", "mlx-lm")]
    assert done.stdout.splitlines() == [f"moectl {__version__}", *packages, f"Python {platform.python_version()}"]
    assert done.stderr == ""


def test_the_versions_without_mlx(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    code, out, _ = call("--version")
    assert code == 0
    assert out.splitlines()[1:3] == ["mlx not installed", "mlx-lm not installed"]


def test_help_lists_verbs_by_section(call: Any) -> None:
    _, out, _ = call("--help")
    headings = [line[:-1] for line in out.splitlines() if re.fullmatch(r"[A-Z]\w+:", line)]
    assert [heading for heading in headings if heading in SECTIONS] == list(SECTIONS)
    listed = re.findall(r"^  ([a-z]+) {2,}[A-Z]", out, re.MULTILINE)
    visible = {str(verb.name) for verb in cli.cli.commands.values() if not verb.hidden}
    assert sorted(listed) == sorted(visible)


def test_no_command_prints_help_and_is_usage(call: Any) -> None:
    code, out, err = call()
    assert code == 2
    assert "Usage: moectl" in out + err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rnu",), "Did you mean 'run'?"),
        (("run", "--max-tokns", "3", "x"), "Did you mean '--max-tokens'?"),
        (("run", "--max-tokens", "0", "x"), "0 is not in the range"),
        (("run", "--top-p", "1.1", "x"), "range"),
        (("run", "--temp", "2.5", "x"), "2.5 is not in the range"),  # before anything is loaded
        (("shard", "--q-bits", "7", "x"), "'7' is not one of"),
        (("run", "--shards", "a", "--model", "b", "x"), "exclude each other"),
        (("run", "--hosts", "a", "--local", "2", "x"), "--hosts and --local exclude each other"),
        (("run", "--shards", "a", "--q-bits", "4", "x"), "--shards and --q-bits exclude each other"),
        (("run", "--local", "1", "bad \udcff"), "the prompt is not UTF-8 text"),
        (("stop", "--timeout", "-1"), "'-1' is no duration: write 30s, 5m, 1h or 0 (at once)"),
        (("logs", "--since", "-5m"), "'-5m' is no duration: write 30s, 5m, 1h or 0 (at once)"),
    ],
)
def test_wrong_words_are_usage_errors(words: tuple[str, ...], message: str, call: Any) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err


def misplaced() -> list[tuple[list[str], str, str]]:
    """Return for every option of every verb: the words with it before the verb, the verb, the words moved."""
    samples: dict[str, str] = {"choice": "auto", "integer range": "1", "float range": "0.5", "duration": "5m"}
    cases = []
    for name, verb in cli.cli.commands.items():
        for param in verb.params:
            if verb.hidden or not isinstance(param, click.Option):
                continue
            takes = not (param.is_flag or param.count)
            for opt in param.opts:
                cases.append(([opt, samples.get(param.type.name, "x")] if takes else [opt], name, opt))
    return cases


@pytest.mark.parametrize(("before", "verb", "option"), misplaced(), ids=lambda value: str(value)[:30])
def test_an_option_before_the_verb_says_where_it_goes(before: list[str], verb: str, option: str, call: Any) -> None:
    code, out, err = call(*before, verb, "x")
    assert (code, out) == (2, "")
    hint = f"put {option} after the verb: moectl {verb} {' '.join(before)} …"
    if option == "--json":
        assert json.loads(err)["error"]["hint"] == hint
    else:
        assert err == f"Error: {option} stands before the verb, where only --help and --version may\nHint: {hint}\n"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("-vq", "plan"), "put -v after the verb: moectl plan -vq"),
        (("-v", "-H", "run", "run", "hi"), "put -v after the verb: moectl run -v -H run …"),
        (("--hosts=a,b", "deploy"), "put --hosts after the verb: moectl deploy --hosts=a,b"),
        (("-m5", "run", "hi"), "put -m after the verb: moectl run -m5 …"),
        (("--system", "be brief", "run"), "put --system after the verb: moectl run --system 'be brief'"),
        (("-v",), "put -v after its verb: moectl VERB -v …"),
        (("-v", "rnu"), "put -v after its verb: moectl VERB -v …"),
        (("--prune", "plan"), "put --prune after its verb: moectl list --prune …"),
    ],
)
def test_where_an_option_goes(words: tuple[str, ...], hint: str, call: Any) -> None:
    code, _, err = call(*words)
    assert (code, err.splitlines()[-1]) == (2, f"Hint: {hint}")


def test_an_option_of_no_verb_is_as_unknown_as_ever(call: Any) -> None:
    code, _, err = call("--bogus", "plan")
    assert code == 2
    assert "No such option" in err


def test_a_prompt_is_needed(call: Any) -> None:
    code, out, err = call("run")
    assert (code, out) == (2, "")
    assert err == 'Error: no prompt is given\nHint: moectl run "What is expert parallelism?"\n'


def test_standard_input_that_is_no_text() -> None:
    done = subprocess.run([*MODULE, "run", "--local", "1"], input=b"\xff\xfe", capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error: standard input is not UTF-8 text")


def test_errors_as_json(call: Any) -> None:
    code, out, err = call("shard", "--verify", "nowhere", "--json")
    assert (code, out) == (8, "")
    assert json.loads(err.splitlines()[-1]) == {
        "error": {
            "code": 8,
            "kind": "NotSharded",
            "host": None,
            "message": "nowhere is not a shard set: it has no moectl.json",
            "hint": "moectl shard MODEL",
        }
    }


def test_colour_of_errors(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, environment, coloured in [
        (("--color", "always"), {}, True),
        (("--color", "never"), {"FORCE_COLOR": "1"}, False),
        ((), {"FORCE_COLOR": "1"}, True),
        ((), {}, False),
    ]:
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert ("\x1b[" in call("shard", "--verify", "nowhere", *words)[2]) == coloured


def test_json_may_come_from_the_configuration(call: Any) -> None:
    Path("moectl.toml").write_text("json = true\n")
    assert json.loads(call("shard", "--verify", "nowhere")[2])["error"]["code"] == 8


def test_usage_errors_as_json(call: Any) -> None:
    code, _, err = call("shard", "--json", "--nodes", "many")
    assert code == 2
    assert json.loads(err.splitlines()[-1])["error"]["code"] == 2


def test_a_result_that_cannot_be_written_is_no_bug(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    Path("hosts.txt").write_text("a\n")
    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = call("hosts")
    assert (code, err.split("\n")[0]) == (8, "Error: the result cannot be written: No space left on device")


def test_bugs_say_what_to_do(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.hosts.hostfile.find_hosts", lambda *_: dict[str, int]()["rope_theta"])
    code, _, err = call("hosts")
    assert code == 1
    assert err.startswith("Error: unexpected KeyError: 'rope_theta' (a bug in moectl)")
    assert "MOECTL_DEBUG=1" in err
    monkeypatch.setenv("MOECTL_DEBUG", "1")
    with pytest.raises(Failed) as caught:
        call("hosts")
    assert isinstance(caught.value.__cause__, KeyError)


def all_errors(kind: type[errors.MoectlError] = errors.MoectlError) -> list[type[errors.MoectlError]]:
    return [kind, *(e for sub in kind.__subclasses__() for e in all_errors(sub))]


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    for kind in all_errors():
        assert kind.__name__ in drawn
    codes = {kind.__name__: kind.exit_code for kind in all_errors()}
    assert codes["UsageError"] == 2
    assert codes["PartialFailure"] == 3
    assert codes["CheckpointError"] == codes["HostsError"] == 4
    assert codes["AuthFailed"] == 5
    assert codes["PeerLost"] == 6
    assert codes["IntegrityError"] == 7
    assert codes["NotDeployed"] == 8


def test_shard_reports(call: Any, model: Path) -> None:
    code, out, _ = call("shard", str(model), "--nodes", "2", "--dry-run", "-o", "out")
    assert (code, Path("out").exists()) == (0, False)
    assert out.startswith("Dry run: nothing was written. ")
    code, out, _ = call("shard", str(model), "--nodes", "3", "-o", "out", "--json")
    document = json.loads(out)
    assert (code, document["shares"], document["directory"]) == (0, [1, 1, 1], "out")
    code, out, _ = call("shard", str(model), "--nodes", "3", "-o", "out", "-q")
    assert (code, out) == (0, "out\n")
    code, out, _ = call("shard", "--verify", "out")
    assert code == 0
    assert "every hash is right" in out
    weights = Path("out/rank-1/layer-001.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, _, err = call("shard", "--verify", "out")
    assert code == 7
    assert "rank-1/layer-001.safetensors" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--nodes", "17", "--split", "experts"), 4, "at most 16 nodes"),
        (("--nodes", "2", "--shares", "1,2,3"), 4, "3 shares were given for 2 nodes"),
        (("--nodes", "1", "--shares", "1,5"), 4, "2 shares were given for 1 nodes"),
        (("--shares", "1,0"), 4, "should be numbers above 0"),
        (("--shares", "a,b"), 2, "--shares should be numbers like 2,1,1"),
        (("--nodes", "2", "--q-bits", "4", "--q-group-size", "48"), 4, "cannot have groups of 48"),
        (("--nodes", "2", "--q-mode", "mxfp4", "--q-bits", "8"), 4, "mxfp4 cannot have 8 bits"),
        ((), 2, "how many nodes?"),
    ],
)
def test_impossible_shards(words: tuple[str, ...], code: int, message: str, call: Any, model: Path) -> None:
    got, out, err = call("shard", str(model), *words)
    assert (got, out) == (code, "")
    assert message in err
    assert len(err.splitlines()) <= 2


def test_configuration_comes_before_built_in_defaults(call: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("moectl.toml").write_text(f'[shard]\nnodes = 2\noutput = "from-file"\nmodel = "{model}"\n')
    assert json.loads(call("shard", "--json")[1])["shares"] == [1, 1]
    monkeypatch.setenv("MOECTL_SHARD_NODES", "3")
    assert json.loads(call("shard", "--json", "-o", "from-environment")[1])["shares"] == [1, 1, 1]
    assert json.loads(call("shard", "--json", "-o", "from-flag", "--nodes", "1")[1])["shares"] == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nmax_tokns = 5\n", "unknown key 'run.max_tokns'. Did you mean 'run.max_tokens'?"),
        ("hostfil = 'x'\n", "unknown key 'hostfil'. Did you mean 'hostfile'?"),
        ("[rnu]\n", "unknown key 'rnu'"),
        ("not toml", "moectl.toml"),
    ],
)
def test_wrong_configuration(text: str, message: str, call: Any) -> None:
    Path("moectl.toml").write_text(text)
    code, out, err = call("hosts", "--hosts", "a")
    assert (code, out) == (2, "")
    assert message in err


def test_mlx_is_told_the_backend_that_rdma_amounts_to(call: Any, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("a ip=10.0.0.1 rdma=-,en2+en3\nb ip=10.0.0.2 rdma=en2+en3,-\n")
    document = json.loads(call("hosts", "--mlx")[1])
    assert (document["backend"], document["hosts"][1]["rdma"]) == ("jaccl", [["en2", "en3"], None])
    (tmp_path / "hosts.txt").write_text("a ip=10.0.0.1 rdma=-,-\nb ip=10.0.0.2 rdma=en2,-\n")
    assert call("hosts", "--mlx")[0] == 4
    (tmp_path / "hosts.txt").write_text("a ip=10.0.0.1\nb ip=10.0.0.2\n")
    assert json.loads(call("hosts", "--mlx")[1])["backend"] == ""


def test_hosts_prints_names_or_mlx_json(call: Any) -> None:
    Path("hosts.txt").write_text("a ip=10.0.0.1\nb ip=10.0.0.2\n")
    assert call("hosts") == (0, "a\nb\n", "")
    assert call("hosts", "--quiet") == (0, "a\nb\n", "")
    assert [h["ssh"] for h in json.loads(call("hosts", "--mlx")[1])["hosts"]] == ["a", "b"]
    assert call("hosts", "--mlx", "--json") == call("hosts", "--mlx")


def test_hosts_as_json_need_no_address(call: Any) -> None:
    Path("hosts.txt").write_text("ada@no.such.invalid:2222 memory=64GB rdma=-,en2\nb ip=10.0.0.2,10.0.1.2 dir=/x\n")
    code, out, err = call("hosts", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["schema"], document["source"], document["backend"]) == ("moectl.hosts/1", "hosts.txt", "")
    first, second = document["hosts"]
    assert (first["rank"], first["host"], first["name"]) == (0, "ada@no.such.invalid:2222", "no.such.invalid")
    assert (first["user"], first["port"], first["ips"], first["rdma"]) == ("ada", 2222, [], [None, "en2"])
    assert (first["memory_bytes"], first["dir"], second["dir"]) == (64_000_000_000, None, "/x")
    assert second["ips"] == ["10.0.0.2", "10.0.1.2"]
    # MLX needs an address, and has no place for a port.
    assert call("hosts", "--mlx")[0] == 4


def test_no_hosts(call: Any) -> None:
    code, _, err = call("deploy")
    assert code == 4
    assert err.startswith("Error: no hosts are given\nHint: ")


def test_sizes_and_times() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 72_900_000_000, 999_950)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "72.9 GB",
        "1.0 MB",
    ]
    assert [time_text(s) for s in (0.42, 59.0, 651)] == ["0.4 s", "59.0 s", "10m51s"]


def test_no_bar_says_more_than_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.cli.progress.QUIET_S", -1.0)
    with progress(quiet=False) as bars:
        advance = bars("mac1", 1_000_000)
        for count in (500_000, 500_000, 200_000, -100_000, 100_000):
            advance(count)
    said = capsys.readouterr().err.splitlines()
    assert said == ["mac1  50%  500.0 kB of 1.0 MB", "mac1  100%  1.0 MB of 1.0 MB"]


def test_tables_drop_columns_instead_of_wrapping() -> None:
    rows = [("mac1", "72.9 GB", "0 B"), ("mac22", "1.0 GB", "10 B")]
    wide = table_text(("HOST", "COPY", "KEEP"), rows, right="bc", width=40)
    assert wide == "HOST      COPY  KEEP\nmac1   72.9 GB   0 B\nmac22   1.0 GB  10 B"
    narrow = table_text(("HOST", "COPY", "KEEP"), rows, right="bc", width=15)
    assert narrow == "HOST      COPY\nmac1   72.9 GB\nmac22   1.0 GB"


@pytest.mark.parametrize(
    ("choice", "environment", "wanted"),
    [
        ("always", {"NO_COLOR": "1"}, True),
        ("never", {"FORCE_COLOR": "1"}, False),
        ("auto", {"FORCE_COLOR": "1"}, True),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ("auto", {}, False),
    ],
)
def test_colour(choice: str, environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with Path("/dev/null").open("w") as stream:
        assert colour_wanted(choice, stream) == wanted


@pytest.mark.parametrize(
    ("wrong", "hint", "right"),
    [
        ("shard tiny --dry-run", "use --nodes N or --hostfile FILE", "shard tiny --dry-run --nodes 2"),
        ("shard tiny --dry-run", "use --nodes N or --hostfile FILE", "shard tiny --dry-run --hostfile two.txt"),
        ("hosts", "write hosts.txt, or use --hosts a,b or --hostfile FILE", "hosts --hosts a,b"),
        ("hosts", "write hosts.txt, or use --hosts a,b or --hostfile FILE", "hosts --hostfile two.txt"),
        ("hosts --hostfile gone.txt", "check --hostfile", "hosts --hostfile two.txt"),
        (
            "hosts --mlx -H localhost:2222,10.0.0.2",
            "put 'Port 2222' under a 'Host' alias in ~/.ssh/config and name the alias",
            "hosts --mlx -H 10.0.0.1,10.0.0.2",
        ),
        (
            "shard tiny -n 2 --dry-run --revision v2",
            "leave --revision out, or name a repository of the Hub",
            "shard tiny -n 2 --dry-run",
        ),
        ("shard tiny -n 2 -o full", "choose a new directory with -o", "shard tiny -n 2 -o new"),
        *(
            (
                "shard odd -n 2 --dry-run --q-bits 4 --q-group-size 128",
                "choose a smaller --q-group-size, --q-bits 16, or another --q-mode",
                f"shard odd -n 2 --dry-run {right}",
            )
            for right in ("--q-bits 4 --q-group-size 32", "--q-bits 16", "--q-mode nvfp4")
        ),
        (
            "shard stored -n 2 --dry-run --q-bits 8",
            "leave --q-bits, --q-group-size and --q-mode out, or start from the 16-bit checkpoint",
            "shard stored -n 2 --dry-run",
        ),
        (
            "shard stored -n 2 --dry-run --q-bits 8",
            "leave --q-bits, --q-group-size and --q-mode out, or start from the 16-bit checkpoint",
            "shard tiny -n 2 --dry-run --q-bits 8",
        ),
        (
            "plan tiny -H a,b,c --chip m4 --memory 32GB --split tensor",
            "--split hidden works on any number of nodes",
            "plan tiny -H a,b,c --chip m4 --memory 32GB --split hidden",
        ),
        ("list --yes", "moectl list --prune", "list --prune --yes"),
    ],
)
def test_what_the_hint_of_a_refused_command_says_is_done(
    wrong: str, hint: str, right: str, call: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MOECTL_HOSTFILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    Path("two.txt").write_text("mac1 ip=10.0.0.1\nmac2 ip=10.0.0.2\n")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("mine")
    if "odd" in wrong:
        write_words(write_checkpoint(Path("odd"), d_model=48, ffn_hidden=96))
    if "stored" in wrong:
        write_words(write_checkpoint(Path("stored"), layout="mlx-quantized"))
    code, _, err = call(*wrong.split())
    assert code != 0
    assert f"Hint: {hint}\n" in err
    assert call(*right.split())[0] == 0


def test_what_the_hint_about_the_configuration_says_is_done(call: Any) -> None:
    file = Path("moectl.toml")
    for mend in (lambda: file.write_text("[run]\nmax_tokens = 5\n"), file.unlink):
        file.write_text("not toml")
        code, _, err = call("hosts", "--hosts", "a")
        assert (code, "Hint: mend or remove that file\n" in err) == (2, True)
        mend()
        assert call("hosts", "--hosts", "a")[0] == 0
