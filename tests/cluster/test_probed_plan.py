"""Planning the cluster that is there: what was measured takes the place of constants, and `bench` compares with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.cli.app import cli
from moectl.cluster import probe, probed_plan
from moectl.demo import demo_dir
from moectl.errors import CommandFailed
from moectl.hosts.hostfile import Host
from moectl.paths import state_dir
from moectl.planner.advice import make_plan
from moectl.planner.measured import MeasuredCluster, Pass, RankSpeed, Speed
from moectl.planner.plan import Question
from moectl.planner.questions import PlanOptions, PlanTask, set_task
from moectl.shards.prepare import Wanted
from tests.support.ring import rank_env

DEMO = str(demo_dir())


@pytest.fixture(autouse=True)
def _shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in rank_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(probed_plan, "BUDGET_S", 0.4)
    monkeypatch.setattr(probed_plan, "LEAST_BUDGET_S", 0.1)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, words, catch_exceptions=False)


def task() -> PlanTask:
    hosts = [Host("a"), Host("b")]
    return set_task("databricks/dbrx-instruct", Wanted(), PlanOptions(chip="m2-ultra", memory="192GB"), hosts)


def question() -> Question:
    return task().question


def test_a_pipeline_is_measured_over_the_ring_only() -> None:
    """JACCL may hang there: mlx#3149."""
    over = {name: {plan.split for plan in probed_plan.list_measurable(task(), name)} for name in ("ring", "jaccl")}
    assert over["ring"] - over["jaccl"] == {"layers"}
    assert probed_plan.list_measurable(replace(task(), split="layers"), "jaccl") == []


def test_links_alone_replace_the_assumed_ones() -> None:
    found = MeasuredCluster((), ((0.0, 2e-3), (2e-3, 0.0)), ((0.0, 4e8), (5e8, 0.0)), ())
    link = probed_plan.use(question(), found).link
    assert (link.latency_s, link.per_node_s, link.bytes_s) == (2e-3, 1e-3, 4e8)
    assert probed_plan.use(question(), found, stated_link="rdma") == question()
    assert probed_plan.use(question(), MeasuredCluster((), (), (), ())) == question()


def test_a_measured_split_is_not_predicted_from_parts() -> None:
    rank = RankSpeed(5e-3, 500e9, 20e12)
    speed = Speed(
        "hidden", (1, 1), Pass(1, 6e-3, 0.01), Pass(64, 0.02, 0.2), {12288: 5e-4, 786432: 1e-3}, (rank,) * 2, 64
    )
    asked = replace(probed_plan.use(question(), MeasuredCluster((), (), (), (speed,))), context=64)
    plan = make_plan(asked, "hidden")
    assert plan.prediction is not None
    assert plan.prediction.decode_tok_s == pytest.approx(1 / (0.01 + 40 * 6e-3))
    assert plan.prediction.ttft_s == pytest.approx(asked.prompt_tokens / 64 * (0.2 + 40 * 0.02))
    assert plan.prediction.communication_share == pytest.approx(41 * 5e-4 / (0.01 + 40 * 6e-3))
    # The others are, with what was measured: 5 ms of work, 0.5 ms of exchange and 0.5 ms more per layer.
    assert asked.calibration.layer_overhead_s == pytest.approx(5e-4)
    assert (asked.link.latency_s, asked.link.bytes_s) == pytest.approx((5e-4, (786432 - 12288) / 5e-4))
    assert [node.rates.bytes_s for node in asked.nodes if node.rates] == [500e9, 500e9]
    later = make_plan(replace(asked, context=4096), "hidden").prediction
    assert later is not None
    cache_s = 40 * (4096 - 64) * 2 * 8 * 128 * 2 / 500e9
    assert 1 / later.decode_tok_s == pytest.approx(0.01 + 40 * 6e-3 + cache_s)


@pytest.mark.parametrize(("memory", "told"), [("256GB", 215e9), ("192GB", 144 * 2**30)])
def test_what_metal_says_replaces_a_rule_of_thumb_only(memory: str, told: float) -> None:
    chip = "m3-ultra" if memory == "256GB" else "m2-ultra"
    hosts = [Host("a"), Host("b")]
    asked = set_task("databricks/dbrx-instruct", Wanted(), PlanOptions(chip=chip, memory=memory), hosts).question
    rank = RankSpeed(5e-3, 500e9, 20e12, 215e9)
    speed = Speed("hidden", (1, 1), Pass(1, 6e-3, 0.01), Pass(64, 0.02, 0.2), {12288: 5e-4}, (rank,) * 2, 64)
    nodes = probed_plan.use(asked, MeasuredCluster((), (), (), (speed,))).nodes
    assert [(node.memory.working_set, node.assumed) for node in nodes] == [(told, "")] * 2


def test_plan_measures_this_machine_and_bench_compares() -> None:
    planned = invoke("plan", DEMO, "--local", "2", "--split", "hidden", "--ctx", "64", "--json")
    document = json.loads(planned.stdout)
    assert document["schema"] == "moectl.plan/1"
    assert document["calibration"] == "measured"
    [speed] = document["measured"]["speeds"]
    assert speed["split"] == document["split"] == "hidden"
    assert document["prediction"]["decode_tok_s"] > 0
    words = ("--local", "2", "--model", DEMO, "-p", "16", "-g", "8", "--num-trials", "1", "--json")
    measured = json.loads(invoke("bench", *words).stdout)
    assert measured["predicted"]["decode_tok_s"] == pytest.approx(document["prediction"]["decode_tok_s"], rel=0.5)
    other = json.loads(invoke("bench", *words, "--split", "experts").stdout)
    assert other["predicted"] is None  # that was not measured


def test_a_host_without_moectl_tells_its_hardware_and_links(ssh_host: Host, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text(f"localhost chip=linux-cpu\n{ssh_host.name} chip=linux-cpu memory=1GB dir={tmp_path}/nothing\n")
    result = invoke("plan", DEMO, "--hostfile", str(hosts), "--probe", "--json")
    document = json.loads(result.stdout)
    first, second = document["nodes"]
    assert first["budget_bytes"] > second["budget_bytes"] == 1_000_000_000
    assert document["link"] == "measured TCP"
    assert document["measured"]["speeds"] == []
    assert f"{ssh_host.name}: moectl is not there yet" in result.stderr


def test_local_ranks_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probed_plan, "_measure_speeds", lambda *_: ())
    budgets = [
        json.loads(invoke("plan", DEMO, "--local", str(n), "--json").stdout)["nodes"][0]["budget_bytes"] for n in (1, 4)
    ]
    assert budgets[1] == pytest.approx(budgets[0] / 4, rel=0.05)


def test_local_and_hosts_exclude_each_other() -> None:
    result = CliRunner().invoke(cli, ["plan", "--local", "2", "--hosts", "a,b"])
    assert "--local and --hosts exclude each other" in str(result.exception)


def test_links_that_cannot_be_timed_are_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CommandFailed("its python did not listen", host="mac1")

    said: list[str] = []
    monkeypatch.setattr(probe, "measure_links", refuse)
    assert probed_plan._measure_links([], said.append) == ((), ())
    assert said == ["mac1: its python did not listen: links are assumed to be as --link says."]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text() | st.sampled_from(['{"schema": "moectl.probe/1"}', "[]", '{"hosts": 3}']))
def test_a_record_that_is_none_predicts_nothing(text: str) -> None:
    state_dir().mkdir(parents=True, exist_ok=True)
    (state_dir() / probed_plan.RECORD).write_text(text, encoding="utf-8", errors="replace")
    asked = question()
    placement = make_plan(asked, "hidden").placement
    assert probed_plan.recall(["a", "b"], placement, None, context=64, prompt_tokens=8) is None
