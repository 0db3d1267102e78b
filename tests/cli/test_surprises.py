"""What surprised a new user, line by line, and what is there instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moectl.cli.target import DEMO_SAYS, take_model
from moectl.cli.verbs.logs import RULE
from moectl.cli.verbs.run import cut_text
from moectl.demo import demo_dir
from moectl.errors import UsageError
from moectl.hosts.hostfile import Host
from moectl.paths import state_dir
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.cli.test_cli import run
from tests.support.tiny import write_checkpoint, write_words

# What was typed → the test of what comes now. The names of models that clients use: tests/server/test_menu.py. A server
# that is there after a reboot: tests/cli/test_service.py.
TESTS = {
    "run llama3 hi": "cli/test_surprises.py::test_a_model_of_other_tools_is_no_prompt",
    "serve, bench with nothing deployed": "cli/test_surprises.py::test_the_demo_is_never_taken_for_a_real_model",
    "run -m 5": "cli/test_surprises.py::test_a_cut_answer_says_what_allows_more",
    "OPTIONS": "server/test_doors.py::test_a_preflight_needs_no_key",
    "/": "server/test_page.py::test_the_page_needs_no_key_and_its_policy_names_its_own_script_and_style",
    "curl without a content type": "server/test_http.py::test_wrong_ways_in",
    "plan on 2 × 64 GB": "planner/test_precision.py::test_plan_chooses_bits_and_says_so",
    "-n, -t, -m": "cli/test_surprises.py::test_old_letters_work_with_a_warning",
    "run --help": "cli/test_surprises.py::test_all_options_are_in_help_all",
    "ls version": "cli/test_surprises.py::test_version_and_ls_are_verbs",
    "rm": "cli/test_surprises.py::test_a_set_is_deleted_by_its_name",
    "show": "cli/test_surprises.py::test_show_says_what_a_set_and_a_model_are",
    "help TOPIC": "cli/test_surprises.py::test_help_knows_verbs_and_guides",
    "plan --what-if": "planner/test_plan.py::test_what_if_answers_a_buyer",
    "bench": "session/test_bench.py::test_the_shown_parts_add_up_to_the_shown_total",
    "bench -p 32,64": "session/test_bench.py::test_several_lengths_are_rows_of_a_table_of_markdown_or_of_csv",
    "bench -q": "cli/test_quiet.py::test_quiet_verbs_print_their_results_and_nothing_else",
    "status": "cli/test_surprises.py::test_status_says_once_that_a_name_is_unknown",
    "logs": "cli/test_surprises.py::test_logs_have_a_rule_between_launches",
    "--ctx 32k": "cli/test_surprises.py::test_tokens_may_be_written_in_thousands",
    "max_tokens: -1": "server/test_openai.py::test_minus_one_is_no_limit_of_tokens",
    "temperature in run and in the API": "cli/test_run.py::test_what_the_user_gives_wins_over_the_models_defaults",
}


@pytest.mark.parametrize("typed", TESTS)
def test_every_surprise_has_its_test(typed: str) -> None:
    path, _, name = TESTS[typed].partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parent.parent / path).read_text(encoding="utf-8")


class Said(list[str]):
    """Stands for the common flags: it keeps what is said."""

    say = list.append


def words_and_options(*words: str, **given: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    options: dict[str, Any] = {"model": None, "shards": None, "demo": False, **given}
    return take_model(Said(), words, options), options  # type: ignore[arg-type]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(capsys, monkeypatch, *words)


def test_a_prompt_may_begin_with_a_model() -> None:
    assert words_and_options("databricks/dbrx-instruct", "hi")[1]["model"] == "databricks/dbrx-instruct"
    assert words_and_options("some/model-4bit", "hi")[0] == ("hi",)
    assert words_and_options(str(demo_dir()), "hi")[1]["model"] == str(demo_dir())
    for kept in (("and/or", "what"), ("llama3 says hi",), ("hello", "llama3"), ("gpt",)):
        assert words_and_options(*kept)[0] == kept
    assert words_and_options("llama3", "hi", model="some/model")[0] == ("llama3", "hi")


def test_a_prompt_may_begin_with_the_deployments_model(tmp_path: Path) -> None:
    directory = prepare.shard(str(demo_dir()), Wanted(nodes=1), directory=tmp_path / "set").directory
    rank = DeployedRank(Host("mac1"), "/python", "/root", "/root/shards/set")
    write_deployment(Deployment("set", str(directory), (rank,)))
    for name in ("set", "moectl-demo"):  # the shard set's, and the one of /v1/models
        assert words_and_options(name, "hi") == (("hi",), {"model": None, "shards": None, "demo": False})


def test_a_model_of_other_tools_is_no_prompt(call: Any) -> None:
    for name in ("llama3", "qwen2.5-coder:7b", "gpt-oss:20b"):
        with pytest.raises(UsageError, match="looks like a model"):
            words_and_options(name, "hi")
    code, out, err = call("run", "llama3", "hi")
    assert (code, out) == (2, "")
    hint = err.rpartition("Hint: moectl ")[2]
    assert call(*hint.split())[0] == 0


def test_the_demo_is_never_taken_for_a_real_model(call: Any) -> None:
    words = ("run", "--raw", "--local", "1", "--max-tokens", "2", "--keep-alive", "0")
    code, _, err = call(*words, "-q", "hi")
    assert (code, err) == (0, f"Warning: no model is named: {DEMO_SAYS}\n")
    code, _, err = call(*words, "--demo", "-q", "hi")
    assert (code, err) == (0, "")


def test_a_cut_answer_says_what_allows_more() -> None:
    assert "--max-tokens 20 allows more" in cut_text(5, 5, thinks=False)
    assert "the context is full" in cut_text(5, None, thinks=False)
    assert "the context is full" in cut_text(5, 6, thinks=False)


def test_a_set_that_run_cut_is_known_by_its_name(call: Any) -> None:
    assert call("run", "--demo", "--local", "1", "--raw", "--max-tokens", "1", "--keep-alive", "0", "-q", "a b")[0] == 0
    name = "moectl-demo-bf16-hidden-1"
    assert name in call("ls")[1]
    flags = ("--raw", "--max-tokens", "1", "--keep-alive", "0")
    code, _, err = call("run", name, "a b", *flags)
    assert (code, "a toy" in err) == (0, False)
    assert f"The model is {name}." in err
    assert call("run", "-m", name, *flags, "a b")[0] == 0
    assert call("show", name)[0] == 0


def test_old_letters_work_with_a_warning(call: Any, tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny", n_layers=1))
    code, _, err = call("shard", str(model), "-n", "1", "-o", "set", "--no-canary", "-q")
    assert (code, err) == (0, "Warning: -n will not mean this in the next version: write --nodes\n")
    code, _, err = call("run", "--shards", "set", "--raw", "-m", "2", "--keep-alive", "0", "-q", "a b")
    assert (code, err) == (0, "Warning: -m will not mean this in the next version: write --max-tokens\n")
    code, _, err = call("run", "--local", "1", "--model", str(model), "-m2", "--raw", "--keep-alive", "0", "-q", "a b")
    assert (code, err) == (0, "Warning: -m will not mean this in the next version: write --max-tokens\n")


def test_all_options_are_in_help_all(call: Any) -> None:
    assert "--min-p" not in call("run", "--help")[1]
    code, out, err = call("run", "--help-all")
    assert (code, err) == (0, "")
    assert "--min-p" in out
    assert "Model:" in out


def test_version_and_ls_are_verbs(call: Any) -> None:
    assert call("version")[1] == call("--version")[1]
    assert call("ls")[1] == call("list")[1]


def test_a_set_is_deleted_by_its_name(call: Any, tmp_path: Path) -> None:
    model = write_words(write_checkpoint(tmp_path / "tiny", n_layers=1))
    assert call("shard", str(model), "--nodes", "1", "--no-canary")[0] == 0
    [name] = call("list", "-q")[1].split()
    code, _, err = call("rm", "tinny")
    assert code == 8
    assert call(*err.rpartition("Hint: moectl ")[2].split())[0] == 0
    assert call("rm", name)[0] == 2  # there is no terminal to ask at
    code, out, _ = call("rm", name, "--yes")
    assert (code, out.split()[:2]) == (0, ["Deleted", f"{name},"])
    assert call("list", "-q")[1].strip() == ""


def test_tokens_may_be_written_in_thousands(call: Any) -> None:
    words = ("plan", "--hosts", "a,b", "--chip", "m3-ultra", "--memory", "512GB", "--ctx")
    assert "KV 32768" in call(*words, "32k")[1]
    assert call(*words, "32x")[0] == 2


def test_logs_have_a_rule_between_launches(call: Any) -> None:
    logs = state_dir() / "logs"
    logs.mkdir(parents=True)
    for rank in range(2):
        lines = [
            f"2026-11-20T17:4{launch}:0{rank}Z {text}\n"
            for launch in range(2)
            for text in (f"rank {rank} of 2 starts on /x", f"loaded {launch}")
        ]
        (logs / f"set-rank-{rank}.log").write_text("".join(lines))
    starts = [f"[localhost/{rank}] rank {rank} of 2 starts on /x" for rank in range(2)]
    loaded = [[f"[localhost/{rank}] loaded {launch}" for rank in range(2)] for launch in range(2)]
    [first, second] = [[starts[0], one[0], starts[1], one[1]] for one in loaded]
    assert call("logs", "--no-timestamps")[1].splitlines() == [*first, RULE, *second]
    assert call("logs", "--no-timestamps", "--last")[1].splitlines() == second
    Path("hosts.txt").write_text("mac1\n")  # nothing is deployed there
    assert call("logs", "--no-timestamps", "--last")[1].splitlines() == second
    assert call("logs", "--hosts", "mac1")[0] == 8


def test_status_says_once_that_a_name_is_unknown(call: Any) -> None:
    code, out, err = call("status", "--hosts", "nosuch.invalid")
    assert code == 5
    assert (out + err).count("no known address") == 1
    assert err.count("nosuch.invalid") == 1
    code, out, err = call("status", "--hosts", "nosuch.invalid,other.invalid")
    assert out.count("no known address") == 2
    assert err.startswith("Error: all 2 hosts failed\n")


def test_show_says_what_a_set_and_a_model_are(call: Any, tmp_path: Path) -> None:
    assert call("shard", str(demo_dir()), "--nodes", "2", "--q-bits", "8", "--no-canary", "-q")[0] == 0
    code, out, err = call("show", "moectl-demo-q8-hidden-2")
    assert (code, err) == (0, "")
    for line in ("precision    8 bits, affine, groups of 64", "split        hidden, shares 1:1", "template     yes"):
        assert line in out
    document = json.loads(call("show", str(demo_dir()), "--json")[1])
    assert (document["set"], document["quantization"], document["sampling"]) == (None, None, {})
    assert document["licence"]
    assert json.loads(call("show", "databricks/dbrx-instruct", "--json")[1])["active_parameters"] > 36e9


def test_help_knows_verbs_and_guides(call: Any) -> None:
    for topic in ("show", "rm", "daily"):
        code, out, err = call("help", topic)
        assert (code, err) == (0, "")
        assert out.startswith("# " if topic == "daily" else "Usage: ")
