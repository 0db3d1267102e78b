"""The plan: shares, choice, refusal and advice; and the command with its contract for scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, strategies as st

from moectl.cli.app import cli
from moectl.cli.options import Failed
from moectl.demo import demo_dir
from moectl.errors import MoectlError, PlanError
from moectl.hosts.hardware import Hardware
from moectl.hosts.hostfile import Host
from moectl.model.catalog import MODELS
from moectl.model.structure import Quantization
from moectl.paths import data_dir
from moectl.planner.advice import make_plan, refusal
from moectl.planner.calibration import DEFAULT, PAPER
from moectl.planner.chips import default_working_set_bytes
from moectl.planner.memory import Memory, Verdict
from moectl.planner.nodes import make_node
from moectl.planner.plan import Node, Question, spread
from moectl.planner.speed import Rates

GIB = 1 << 30


def mac(name: str, gib: int, bandwidth_gb_s: float = 273.0, in_use: int = 0) -> Node:
    memory = Memory(gib * GIB, default_working_set_bytes(gib * GIB), in_use)
    return Node(name, memory, Rates(bandwidth_gb_s * 0.8e9, 5e12), 2, 1399.0)


def ask(*nodes: Node, bits: int = 4, link: str = "tb-tcp", **more: Any) -> Question:
    model = MODELS["databricks/dbrx-instruct"].quantised(None if bits == 16 else Quantization(bits, 64))
    return Question(model.structure, model.quantization, nodes, DEFAULT.links[link], DEFAULT, can_quantise=True, **more)


def test_auto_knows_that_hidden_does_not_fit_small_macs() -> None:
    """4 × 32 GB at 4 bits: replicated attention is what breaks `hidden`."""
    plan = make_plan(ask(*(mac(name, 32) for name in "abcd")))
    assert (plan.split, plan.verdict) in (("tensor", Verdict.FITS), ("layers", Verdict.FITS))
    assert make_plan(ask(*(mac(name, 32) for name in "abcd")), "hidden").verdict is Verdict.BORDERLINE


def test_auto_takes_the_fastest_that_fits_and_says_why() -> None:
    plan = make_plan(ask(*(mac(name, 192, 800) for name in "abcd")))
    speeds = {split: make_plan(ask(*(mac(n, 192, 800) for n in "abcd")), split) for split in ("experts", "tensor")}
    assert plan.split == "hidden"
    assert plan.why == "hidden: balanced at batch 1; experts would be 1.97× slower in the experts"
    assert plan.prediction is not None
    for other in speeds.values():
        assert other.prediction is not None
        assert other.prediction.decode_tok_s <= plan.prediction.decode_tok_s
    fast = make_plan(ask(*(mac(name, 192, 800) for name in "abcd"), link="rdma"))
    assert fast.split == "tensor"


def test_copies_are_counted_in_memory_and_speed() -> None:
    nodes = [mac(name, 192, 800) for name in "abcd"]
    once, twice = make_plan(ask(*nodes), "experts"), make_plan(ask(*nodes, replicas=2))
    assert twice.split == "experts"
    assert [len(held) for held in twice.placement.held or ()] == [8, 8, 8, 8]
    assert twice.nodes[0].need.weights > 1.8 * once.nodes[0].need.weights
    assert once.prediction is not None
    assert twice.prediction is not None
    assert twice.prediction.decode_tok_s > 1.1 * once.prediction.decode_tok_s
    uneven = make_plan(ask(mac("big", 192, 800), mac("small", 64, 400), mac("less", 64, 300), replicas=2))
    assert uneven.feasible
    assert max(uneven.placement.shares) <= 16
    assert sum(uneven.placement.shares) == 32
    with pytest.raises(PlanError, match="--split hidden has none"):
        make_plan(ask(*nodes, replicas=2), "hidden")


def test_unequal_nodes_get_shares_by_bandwidth() -> None:
    """Facts: M3 Ultra and M4 Max, 39 tok/s by bandwidth, 33 when even, 29 alone."""
    nodes = mac("m3u", 256, 819), mac("m4max", 128, 546)
    plan = make_plan(ask(*nodes, link="rdma", context=256), "hidden")
    assert plan.placement.shares == (101, 67)
    even = make_plan(ask(*nodes, link="rdma", context=256), "hidden", shares=(84, 84))
    alone = make_plan(ask(nodes[0], context=256), "hidden")
    speeds = [p.prediction.decode_tok_s for p in (plan, even, alone) if p.prediction]
    assert speeds == pytest.approx([39, 33, 29], rel=0.08)


def test_memory_limits_shares() -> None:
    """The faster node is the smaller one: it takes what it can hold, the other the rest."""
    plan = make_plan(ask(mac("fast", 48, 800), mac("slow", 192, 273)), "hidden")
    assert plan.verdict is Verdict.FITS
    assert plan.placement.shares[0] < plan.placement.shares[1]
    layers = make_plan(ask(mac("small", 48), mac("large", 192)), "layers")
    assert layers.verdict is Verdict.FITS
    assert layers.placement.shares[1] == pytest.approx(4 * layers.placement.shares[0], rel=0.5)


def test_one_node_is_enough() -> None:
    plan = make_plan(ask(mac("big", 192, 800), mac("other", 192, 800), link="10gbe"))
    assert any(line.startswith("one node is enough: big alone holds it, at 1.") for line in plan.advice)


def test_a_refusal_names_the_node_the_bytes_and_what_would_fit() -> None:
    plan = make_plan(ask(*(mac(name, 24) for name in "abcd")))
    assert not plan.feasible
    error = refusal(plan)
    said = r"the model does not fit: [ad] needs 20\.\d GB, 17\.2 GB is usable \(2\.\d GB too little\)"
    assert re.fullmatch(said, error.message)
    hint = str(error.hint)
    assert "--q-bits 3" in hint
    assert "hosts like d fit" in hint
    assert "sudo sysctl iogpu.wired_limit_mb=" in hint


def test_the_raised_limit_that_is_advised_is_enough() -> None:
    node = mac("a", 96)
    plan = make_plan(ask(node))
    assert plan.verdict is Verdict.BORDERLINE
    (line,) = (text for text in plan.advice if "wired_limit_mb" in text)
    raised = Memory(node.memory.total, int(line.rpartition("=")[2]) << 20)
    assert make_plan(ask(Node("a", raised, node.rates, 2))).verdict is Verdict.FITS


def test_memory_in_use_is_counted_and_named() -> None:
    assert make_plan(ask(mac("a", 128))).verdict is Verdict.FITS
    plan = make_plan(ask(mac("a", 128, in_use=54_000_000_000)))
    assert plan.verdict is Verdict.BORDERLINE
    assert "on a: close programs, 54.0 GB are in use and would be swapped out" in plan.advice


def test_advised_contexts_and_bits_do_fit() -> None:
    plan = make_plan(ask(mac("a", 96), bits=4, context=32768))
    for line in plan.advice:
        if line.startswith("--ctx"):
            assert make_plan(ask(mac("a", 96), bits=4, context=int(line.split()[1]))).verdict is Verdict.FITS
        if line.startswith("--q-bits") and "fits" in line:
            assert make_plan(ask(mac("a", 96), bits=int(line.split()[1]), context=32768)).verdict is Verdict.FITS


def test_without_speeds_there_is_no_prediction() -> None:
    memory = Memory(192 * GIB, 144 * GIB)
    plan = make_plan(ask(*(Node(name, memory, None, 2) for name in "ab")))
    assert plan.prediction is None
    assert plan.feasible


@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(1, 200)), min_size=1, max_size=8),
)
def test_spread_divides_everything_within_the_limits(total: int, nodes: list[tuple[float, int]]) -> None:
    weights, limits = [w for w, _ in nodes], [limit for _, limit in nodes]
    shares = spread(total, weights, limits)
    if shares is None:
        assert sum(limits) < total or total < len(nodes)
        return
    assert sum(shares) == total
    assert all(1 <= share <= limit for share, limit in zip(shares, limits, strict=True))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"split": "layers", "shares": (8, 0, 8)}, "should be numbers above 0"),
        ({"split": "hidden", "shares": (100, 68)}, "2 shares were given for 3 nodes"),
    ],
)
def test_placements_that_cannot_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(ask(*(mac(name, 64) for name in "abc")), **asked)


# The command.


def plan(*words: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *words], env={"COLUMNS": "120"})


CONTRACT = (
    *("databricks/dbrx-instruct", "--hosts", "a,b", "--chip", "m2-ultra", "--memory", "192GB", "--link", "10gbe"),
    *("--q-bits", "16", "--split", "experts", "--calibration", "paper", "--json"),
)


def test_the_contract_for_scripts() -> None:
    result = plan(*CONTRACT)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["schema"] == "moectl.plan/1"
    assert document["feasible"] is True
    assert document["split"] == "experts"
    assert [node["host"] for node in document["nodes"]] == ["a", "b"]
    for node in document["nodes"]:
        assert node["weights_bytes"] + node["kv_bytes"] < node["need_bytes"] <= 0.9 * node["budget_bytes"]
    predicted = document["prediction"]
    assert predicted["decode_tok_s"] == pytest.approx(6.1, rel=0.10)
    assert predicted["communication_share"] == pytest.approx(0.23, abs=0.04)
    assert predicted["collectives_per_token"] == 40
    assert predicted["tok_s_per_usd"] == pytest.approx(predicted["decode_tok_s"] / (2 * 6599))
    assert predicted["ttft_s"] > 0
    assert predicted["prefill_tok_s"] > 0
    assert isinstance(document["advice"], list)
    assert document["why"].startswith("experts: as asked")


def test_what_does_not_fit_is_exit_4_after_the_table() -> None:
    result = plan("--hosts", "a", "--chip", "m2-ultra", "--memory", "192GB", "--q-bits", "16", "--json")
    assert json.loads(result.stdout)["feasible"] is False
    assert isinstance(result.exception, Failed)
    assert isinstance(result.exception.error, PlanError)
    assert result.exception.error.exit_code == 4


@pytest.mark.parametrize("columns", ["40", "60", "80", "120"])
def test_tables_never_wrap(columns: str) -> None:
    words = ["plan", "--hosts", "a,b", "--chip", "m2-ultra", "--memory", "192GB"]
    lines = CliRunner().invoke(cli, words, env={"COLUMNS": columns}).stdout.splitlines()
    assert all(len(line) <= int(columns) for line in lines[1:4])
    assert lines[1].startswith("RANK  HOST")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hosts", "a", "--chip", "m7", "--memory", "1GB"), "unknown chip 'm7'"),
        (("--hosts", "a", "--chip", "m4", "--memory", "0"), "not a size above zero"),
        (("--hosts", "a", "--chip", "m4"), "its memory is not known"),
        (("--hosts", "a", "--memory", "8GB"), "its chip is not known"),
        (("--hosts", "a", "--chip", "m4", "--memory", "32GB", "--ctx", "99999"), "beyond the model's 32768"),
        (("--hosts", "a", "--chip", "m4", "--memory", "32GB", "--link", "string"), "unknown link 'string'"),
        (
            ("--hosts", "a,b,c,d,e,f,g,h,i", "--chip", "m4", "--memory", "32GB", "--split", "tensor"),
            "cannot be divided by 9 nodes",
        ),
        (("--hosts", "a,b", "--chip", "m4", "--memory", "32GB", "--shares", "1,2,3"), "3 shares were given for 2"),
        ((), "no hosts are given"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = plan(*words)
    assert isinstance(result.exception, Failed)
    error = result.exception.error
    assert message in str(error)
    assert "\n" not in str(error)


def test_hosts_files_say_what_each_host_has(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("mac1 chip=m3-ultra memory=512GB price=9499\nmac2 chip=m4-max memory=100GB\n")
    document = json.loads(plan("--hostfile", str(hosts), "--q-bits", "4", "--json").stdout)
    assert document["nodes"][1]["budget_bytes"] == 100_000_000_000  # what its owner gives of 128 GiB
    assert document["shares"][0] > document["shares"][1]


def test_a_checkpoint_in_a_directory_is_planned_by_its_headers() -> None:
    document = json.loads(plan(str(demo_dir()), "--hosts", "a,b", "--chip", "m4", "--memory", "16GB", "--json").stdout)
    assert document["model"] == "moectl-demo"
    assert document["feasible"]


@pytest.mark.no_cover  # the tracer takes seven times as long as the sums
def test_what_if_lists_what_one_could_buy() -> None:
    result = plan("--what-if", "--all", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert {row["q_bits"] for row in rows} == {4, 8, 16}
    assert {row["nodes"] for row in rows} == {1, 2, 3, 4, 8}
    assert not any(row["link"] == "rdma" for row in rows if row["chip"] in ("m2-ultra", "m4"))
    assert PAPER.name in plan("--help-all").stdout


def offers(*words: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(plan("--what-if", *words, "--json").stdout)["rows"]
    return rows


def test_what_if_answers_a_buyer() -> None:
    rows = offers()
    assert len(rows) == 10
    assert {("m5-max", 128), ("m3-ultra", 256)} <= {(row["chip"], row["memory_gib"]) for row in rows}
    assert [row["decode_tok_s"] for row in rows] == sorted((row["decode_tok_s"] for row in rows), reverse=True)
    shown = plan("--what-if").stdout
    assert "Sorted: fastest first; for each machine the fewest that hold it." in shown
    assert "3,699 USD" in shown
    cheap = offers("--budget", "8000")
    assert cheap
    assert all(row["usd"] <= 8000 for row in cheap)
    fast = offers("--min-tok-s", "25")
    assert all(row["decode_tok_s"] >= 25 for row in fast)
    prices = [row["usd"] for row in fast if row["usd"]]
    assert prices == sorted(prices)


def test_shard_deploy_and_run_refuse_by_the_same_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before the refusal; --force goes on and warns."""
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("a chip=linux-cpu memory=400MB\nb chip=linux-cpu memory=64GB\n")
    small = ("--hostfile", str(hosts))
    refused = CliRunner().invoke(cli, ["shard", str(demo_dir()), *small])
    assert isinstance(refused.exception, Failed)
    assert re.match("the model does not fit: a needs 0.4 GB, 0.3 GB is usable", str(refused.exception.error))
    assert not (data_dir() / "shards").exists()
    forced = CliRunner().invoke(cli, ["shard", str(demo_dir()), *small, "--force"], catch_exceptions=False)
    assert forced.exit_code == 0
    assert "Warning: a needs 0.4 GB, 0.3 GB is usable" in forced.stderr
    deployed = CliRunner().invoke(cli, ["deploy", str(hosts)])
    assert isinstance(deployed.exception, Failed)
    assert "does not fit: a needs 0.4 GB" in str(deployed.exception.error)
    tiny = Node("this machine", Memory(400_000_000), None, 4, None, is_mac=False)
    monkeypatch.setattr("moectl.planner.questions.own_node", lambda: tiny)
    ran = CliRunner().invoke(cli, ["run", "--local", "2", "--model", str(demo_dir()), "Hello"])
    assert isinstance(ran.exception, Failed)
    assert "does not fit: this machine needs 0.9 GB" in str(ran.exception.error)


def test_shard_chooses_what_the_plan_finds_fastest(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("a chip=m4-max memory=128GB\nb chip=m4 memory=32GB\n")
    words = ["shard", str(demo_dir()), "--hostfile", str(hosts), "--json", "--dry-run"]
    made = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert json.loads(made.stdout)["split"] in ("hidden", "layers", "experts")
    words = ["plan", str(demo_dir()), "--hostfile", str(hosts), "--json"]
    planned = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)
    assert [planned["split"], planned["shares"]] == [json.loads(made.stdout)[key] for key in ("split", "shares")]
    assert planned["why"] in made.stderr


def test_the_papers_tokens_per_dollar() -> None:
    """arXiv 2506.23635: two Mac Studios give 1.15 times the tok/s per USD of eight H100s, with one set of constants."""

    def per_usd(hosts: str, chip: str, memory: str) -> float:
        words = ["plan", "--hosts", hosts, "--chip", chip, "--memory", memory, "--q-bits", "16", "--split", "experts"]
        result = CliRunner().invoke(cli, [*words, "--calibration", "paper", "--json"], catch_exceptions=False)
        return float(json.loads(result.stdout)["prediction"]["tok_s_per_usd"])

    assert per_usd("a,b", "m2-ultra", "192GB") / per_usd("dgx", "dgx-h100", "640GB") == pytest.approx(1.15, rel=0.05)


def failed(*words: str) -> str:
    result = CliRunner().invoke(cli, ["plan", *words])
    assert isinstance(result.exception, Failed), result.output
    return str(result.exception.error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--what-if", "--ctx", "99999"), "a context of 99999 tokens is beyond the model's 32768"),
        (("--what-if", "--hosts", "a,b"), "--what-if and --hosts exclude each other"),
        (("--what-if", "--split", "tensor"), "--what-if and --split exclude each other"),
        (("--what-if", "--chip", "m9"), "unknown chip 'm9'."),
        (("--what-if", "--chip", "m1-max"), "the table has no m1-max; it has m2-ultra, "),
        (("--what-if", "--link", "wifi"), "unknown link 'wifi'; it is one of"),
        (("--what-if", "--budget", "100"), "none of these clusters is so cheap and so fast: "),
        (("--hosts", "a", "--budget", "100"), "--budget, --min-tok-s and --all are for --what-if"),
        (("--what-if", "--chip", "m4", "--q-bits", "16"), "none of these clusters holds databricks/dbrx-instruct"),
        (("--hosts", "a", "--chip", "m4", "--memory", "192"), "'192' is 192 bytes: no host has so little memory"),
        (
            ("--hosts", "a", "--chip", "m4", "--memory", "32GB", "-p", "5000"),
            "a prompt of 5000 tokens is beyond",
        ),
        (("--local", "64"), "64 nodes are too many: the model has 4 parts that can be divided"),
        (("--local", "17", "--split", "experts"), "17 nodes are too many: the model has 16 experts"),
        (("--local", "2", "--chip", "zz"), "unknown chip 'zz'."),
    ],
)
def test_what_cannot_be_asked(words: tuple[str, ...], message: str) -> None:
    if "--local" in words:
        words = (str(demo_dir()), *words)
    assert failed(*words).startswith(message)


def test_what_if_for_one_chip_and_link() -> None:
    rows = json.loads(plan("--what-if", "--chip", "M3 Ultra", "--link", "rdma", "--json").stdout)["rows"]
    assert {(row["chip"], row["link"]) for row in rows} == {("m3-ultra", "rdma")}


def test_sizes_of_all_bins_of_a_chip_are_whole_machines() -> None:
    """A 96 GB M3 Max has 30 GPU cores; its owner may call it m3-max, and it still cannot give 96 GB."""
    words = ("--hosts", "a", "--memory", "96GB", "--q-bits", "4", "--json")
    budgets = [
        json.loads(plan(*words, "--chip", chip).stdout)["nodes"][0]["budget_bytes"] for chip in ("m3-max", "m3-max-30")
    ]
    assert budgets == [default_working_set_bytes(96 << 30)] * 2


def test_the_gpus_limit_is_that_of_the_version_that_was_found() -> None:
    def make(version: str, gib: int) -> Node:
        found = Hardware(chip="m4-max", memory_bytes=gib * GIB, os="macOS", os_version=version)
        return make_node(Host("mac"), DEFAULT, found=found)

    assert make("26.2", 64).memory.working_set == int(51.84 * GIB)
    assert make("15.5", 64).memory.working_set == 48 * GIB
    assert make("26.2", 64).assumed == make("15.5", 64).assumed == ""
    assert make("26.2", 36).assumed == (
        "no reading of the GPU's limit is known for 36 GiB with macOS 26: 25.8 GB is a rule of thumb; "
        "--probe asks Macs that have moectl"
    )
    found = Hardware(chip="m4-max", memory_bytes=36 * GIB, wired_limit_bytes=30 * GIB, os="macOS", os_version="26.2")
    assert make_node(Host("mac"), DEFAULT, found=found).assumed == ""  # its owner has set one


def test_a_rule_of_thumb_is_told() -> None:
    words = ("--hosts", "a,b", "--chip", "m3-ultra", "--memory", "256GB", "--q-bits", "4")
    assert "a, b: no reading of the GPU's limit is known for 256 GiB with macOS: 206.2 GB" in plan(*words).stdout
    assert all(node["assumed"] for node in json.loads(plan(*words, "--json").stdout)["nodes"])
    assert "no reading" not in plan("--hosts", "a,b", "--chip", "m2-ultra", "--memory", "192GB").stdout


def test_what_if_knows_a_dgx_spark_and_a_mac_with_256_gb() -> None:
    rows = json.loads(plan("--what-if", "--all", "--q-bits", "4", "--json").stdout)["rows"]
    assert {row["link"] for row in rows if row["chip"] == "gb10"} == {"10gbe"}  # it has no Thunderbolt
    assert {row["memory_gib"] for row in rows if row["chip"] == "m3-ultra"} == {96, 256, 512}
    assert not any(row["tok_s_per_usd"] for row in rows if row["memory_gib"] == 256)  # its price is not known


def test_advice_about_concurrency_and_links() -> None:
    tight = json.loads(
        plan(
            "--hosts",
            "a,b",
            "--chip",
            "m2-ultra",
            "--memory",
            "192GB",
            "--q-bits",
            "8",
            "--json",
            "--concurrency",
            "500",
        ).stdout
    )
    assert any(re.fullmatch(r"--concurrency \d+ fits", advice) for advice in tight["advice"])
    slow = json.loads(
        plan(
            "--hosts", "a,b", "--chip", "m2-ultra", "--memory", "192GB", "--link", "rdma", "--q-bits", "8", "--json"
        ).stdout
    )
    assert slow["advice"][0] == "RDMA needs Thunderbolt 5, which is missing on a, b: use tb-tcp"


def test_a_model_known_by_name_is_refused_before_it_is_looked_for(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.txt"
    hosts.write_text("a chip=m4 memory=16GB\nb chip=m4 memory=16GB\n")
    result = CliRunner().invoke(cli, ["shard", "databricks/dbrx-instruct", "--hostfile", str(hosts), "--dry-run"])
    assert isinstance(result.exception, Failed)
    assert re.match("the model does not fit: [ab] needs", str(result.exception.error))


@pytest.mark.parametrize(
    ("wrong", "hint", "right"),
    [
        ("-H a --chip m7 --memory 32GB", "chips are ", "-H a --chip m2-ultra --memory 192GB"),
        (
            "-H a --chip m2-ultra",
            "write memory=… in the hosts file (",
            "-H a --chip m2-ultra --memory 192GB",
        ),
        (
            "-H a --memory 192GB",
            "write 'a chip=m2-ultra memory=192GB' in the hosts file, use --chip, or --probe to ask it",
            "--hostfile told.txt",
        ),
        (
            "-H a --chip m2-ultra --memory 192GB --ctx 99999",
            "--ctx 32768",
            "-H a --chip m2-ultra --memory 192GB --ctx 32768",
        ),
        (
            "-H a,b,c,d,e,f,g,h,i --chip m4 --memory 32GB --split tensor",
            "--split hidden works on any number of nodes",
            "-H a,b,c,d,e,f,g,h,i --chip m4 --memory 32GB --split hidden",
        ),
        (
            "-H a --chip m2-ultra --memory 192GB --ctx 1000 --prompt-tokens 2000",
            "--ctx 2000 or more, as far as the model goes",
            "-H a --chip m2-ultra --memory 192GB --ctx 2000 --prompt-tokens 2000",
        ),
        (
            "--what-if --chip m1-max",
            "moectl plan --hosts a,b --chip … asks for any",
            "--hosts a,b --chip m1-max --memory 64GB",
        ),
        ("--what-if --chip m4 --ctx 32768 --q-bits 16", "moectl plan --what-if shows all", "--what-if"),
        ("--hosts a --all", "add --what-if", "--what-if --all"),
    ],
)
def test_what_a_hint_of_plan_says_is_planned(
    wrong: str, hint: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("told.txt").write_text("a chip=m2-ultra memory=192GB\n")
    for words, good in ((wrong, False), (right, True)):
        result = plan(*words.split(), *(() if "--q-bits" in wrong else ("--q-bits", "4")))
        assert (result.exit_code == 0) is good, result.output
        if not good:
            assert isinstance(result.exception, Failed)
            error = result.exception.error
            assert isinstance(error, MoectlError)
            assert str(error.hint).startswith(hint)
