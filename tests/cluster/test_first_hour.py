"""The first hour: each judgement from recorded numbers, no name in the report, and the whole of it over real sshd."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moectl import __main__
from moectl.cluster.first_hour import exchanges, hour, on_macs
from moectl.cluster.first_hour.exchanges import EXCHANGE, GATHER
from moectl.cluster.first_hour.hour import HOUR_S, STEPS, spend_first_hour, try_step
from moectl.cluster.first_hour.on_macs import (
    RDMA,
    SLEEP,
    WIRED,
    measure_rdma,
    measure_sleep,
    measure_wired,
    parse_assertions,
    parse_wired,
)
from moectl.cluster.first_hour.on_random import KNOB, LAYERS, SHARES, divide_evenly, divide_fast
from moectl.cluster.first_hour.on_workers import IDLE, SKEW
from moectl.cluster.first_hour.scrub import Scrubber
from moectl.cluster.first_hour.stage import Facts, Stage
from moectl.cluster.first_hour.step import Data, Ending, HourStep, Judgement
from moectl.demo import demo_dir
from moectl.engine.exchange_times import ExchangeJob
from moectl.errors import CommandFailed, HostsError, MoectlError, Stalled
from moectl.hosts.hostfile import Host
from moectl.hosts.remote import Completed, LocalRemote
from moectl.hosts.survey import read_survey
from moectl.session.deployment import DeployedRank, Deployment, write_deployment
from moectl.session.session import RankSpec
from tests.support.cutting import cut
from tests.support.netns import Cluster
from tests.support.ring import rank_env
from tests.support.running import processes, workers
from tests.support.sshd import Server

RECORDINGS = Path(__file__).parent.parent / "recordings"
STUDIO = (RECORDINGS / "mac-studio-m2-ultra.txt").read_text()
# `pmset -g assertions` of macOS 15 while caffeinate runs, as published (jbranchaud/til); the names are made up.
ASSERTIONS = """\
2025-11-02 13:20:57 -0600
Assertion status system-wide:
   BackgroundTask                 0
   UserIsActive                   1
   PreventUserIdleDisplaySleep    0
   PreventSystemSleep             0
   PreventUserIdleSystemSleep     1
   NetworkClientActive            0
Listed by owning process:
   pid 98217(caffeinate): [0x00045477000194b3] 00:00:03 PreventUserIdleSystemSleep named: "caffeinate command-line tool"
        Details: caffeinate asserting for 1600 secs
        Localized=THE CAFFEINATE TOOL IS PREVENTING SLEEP.
   pid 145(Adas Program): [0x00044f2f00099212] 00:00:00 UserIsActive named: "keyboard of ada"
   pid 80(powerd): [0x00044f2f00019216] 00:22:34 PreventUserIdleSystemSleep named: "Powerd - Prevent sleep"
"""


# Judgements, from recorded data.

ROW = {
    "rank": 0,
    "macos": "26.3",
    "macos_of_python": "26.3",
    "wheel": "",
    "jaccl": True,
    "rdma_ctl": "enabled",
    "thunderbolt": 5,
    "may": True,
}
WIRED_DATA = {"macs": [0, 1], "before_bytes": [4e9, 4e9], "during_bytes": [40e9, 40e9]}
IDLE_DATA = {"ranks": 2, "idle_s": 300.0, "warm_s": 0.5, "again_s": 0.5, "held_bytes": [37e9, 37e9]}


def layers_of(*pairs: tuple[Any, float]) -> list[dict[str, Any]]:
    return [{"shares": a, "env": a, "token_s": s, "prompt_token_s": s} for a, s in pairs]


@pytest.mark.parametrize(
    ("step", "data", "right", "words"),
    [
        (RDMA, {"hosts": [ROW, ROW]}, True, "JACCL is in MLX on 2 of 2 Macs"),
        (RDMA, {"hosts": [ROW, {**ROW, "rdma_ctl": "disabled"}]}, False, "moectl setup"),
        (RDMA, {"hosts": [{**ROW, "jaccl": False, "macos_of_python": "16.0"}]}, False, "sees 16"),
        (RDMA, {"hosts": [{**ROW, "jaccl": False}]}, False, "deploy again"),
        (EXCHANGE, {"ranks": 2, "seconds": {"jaccl": {"12288": 30e-6}}, "broken": {}}, True, "jaccl 0.030 ms"),
        (EXCHANGE, {"ranks": 2, "seconds": {"ring": {"12288": 5e-3}}, "broken": {}}, False, "slow link"),
        (EXCHANGE, {"ranks": 3, "seconds": {"ring": {"12288": 3e-4}}, "broken": {"ring": "x"}}, False, "ring (x)"),
        (EXCHANGE, {"ranks": 2, "seconds": {}, "broken": {"ring": "no way"}}, False, "no backend gave a time"),
        (SKEW, {"delay_s": 10.0, "survived": True}, True, "10 s later"),
        (SKEW, {"delay_s": 10.0, "survived": False, "error": "GPU Timeout"}, False, "GPU Timeout"),
        (IDLE, {**IDLE_DATA, "after_idle_s": 0.6}, True, "600 ms after 5m00s of rest, 500 ms warm"),
        (IDLE, {**IDLE_DATA, "after_idle_s": 4.0}, False, "unwires"),
        (IDLE, {**IDLE_DATA, "held_bytes": [1e6], "after_idle_s": 0.6}, True, "deploy the model that you want"),
        (WIRED, {**WIRED_DATA, "after_bytes": [4.1e9, 3.9e9]}, True, "as before"),
        (WIRED, {**WIRED_DATA, "after_bytes": [4e9, 39e9]}, False, "35.0 GB on rank 1's Mac"),
        (WIRED, {**WIRED_DATA, "during_bytes": [None] * 2, "after_bytes": [None] * 2}, False, "told nothing"),
        (SHARES, {"shares": layers_of(([84, 84], 2e-3), ([88, 80], 1e-3))}, True, "--shares 88,80"),
        (SHARES, {"shares": layers_of(([84, 84], 1e-3), ([88, 80], 1e-3))}, False, "leave the shares"),
        (KNOB, {"settings": layers_of(({}, 2e-3), ({"A": "1"}, 1e-3), ({"A": "2"}, 3e-3))}, True, "set A=1"),
        (KNOB, {"settings": layers_of(({}, 1e-3), ({"A": "1"}, 1e-3))}, False, "leave MLX's own"),
        (LAYERS, {"chunk_s": 4.0, "wait_s": 3.0}, True, "the last rank waits 3.00 s"),
        (LAYERS, {"chunk_s": 20.0, "wait_s": 15.0}, False, "--prefill-step 136"),
    ],
)
def test_judgements(step: HourStep, data: Data, right: bool, words: str) -> None:
    found = step.judge(data)
    assert found.as_expected is right
    assert words in f"{found.came} | {found.owner} | {found.developers}"


def test_the_border_of_gathering_is_not_moved_by_one_size_that_noise_has_hit() -> None:
    times = {4096: (2, 1), 12288: (1, 2), 32768: (1, 2), 65536: (1, 3), 131072: (5, 1), 262144: (5, 1)}
    data: Data = {
        "ranks": 4,
        "backend": "ring",
        "broken": "",
        "seconds": {str(n): {"gather": g, "reduce": r} for n, (g, r) in times.items()},
    }
    assert GATHER.judge(data) == Judgement(True, "gathering is faster up to 65536 bytes (ring, 4 ranks)")
    data["seconds"]["65536"] = {"gather": 3, "reduce": 1}
    assert "GATHER_BELOW_BYTES to 32768" in GATHER.judge(data).developers
    assert "broke off after 262144 bytes: Stalled" in GATHER.judge({**data, "broken": "Stalled"}).came


def test_what_was_timed_before_a_size_hangs_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = mac_stage({})

    def time_exchange(session: object, number: int, job: ExchangeJob) -> dict[str, float]:
        if number == 3:
            raise Stalled("nothing was computed for 120 s")
        return {way: 1e-5 for way in job.ways}

    monkeypatch.setattr(exchanges, "time_exchange", time_exchange)
    monkeypatch.setattr(_NoWorkers, "open_exchanges", open_or_refuse)
    found = exchanges.measure_exchanges(stage)
    assert found["seconds"] == {"ring": {"256": 1e-5, "4096": 1e-5}}
    assert found["broken"] == {"ring": "nothing was computed for 120 s"}
    assert found["absent"] == {"jaccl": "no devices", "jaccl-ring": "no devices"}
    assert "broke off: ring" in EXCHANGE.judge({**found, "ranks": 2}).came


def open_or_refuse(_: Stage, backend: str) -> Any:
    if backend != "ring":
        raise HostsError("no devices")
    return contextlib.nullcontext()


def test_sleep_is_judged_by_what_the_worker_itself_holds() -> None:
    [idle, busy] = [{"PreventUserIdleSystemSleep": 1, "PreventSystemSleep": 0, "caffeinate": n} for n in (0, 1)]
    assert SLEEP.judge({"before": [idle], "during": [busy]}).as_expected
    assert not SLEEP.judge({"before": [busy], "during": [busy]}).as_expected


def test_all_steps_fit_into_an_hour_and_say_why() -> None:
    assert sum(step.seconds for step in STEPS) <= HOUR_S
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.expected and step.source and step.question.endswith("?") for step in STEPS)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_shares_are_all_of_the_groups(ranks: int) -> None:
    assert sum(divide_evenly(ranks)) == sum(divide_fast(ranks)) == 168
    assert all(share % 8 == 0 for share in divide_fast(ranks))


def test_shares_of_the_issue() -> None:
    assert (divide_evenly(2), divide_fast(2)) == ((84, 84), (88, 80))
    assert divide_fast(4) == (48, 40, 40, 40)


# macOS's tools.


def test_wired_memory_is_read() -> None:
    assert parse_wired(STUDIO) == 310022 * 16384
    assert parse_wired("Mach Virtual Memory Statistics:") is None


def test_assertions_are_counted_and_not_named() -> None:
    assert parse_assertions(ASSERTIONS) == {
        "PreventUserIdleSystemSleep": 1,
        "PreventSystemSleep": 0,
        "caffeinate": 1,
    }
    assert not any(parse_assertions("").values())


class _Mac(LocalRemote):
    """A host whose tools print what a Mac's print; it logs what was asked."""

    def __init__(self, texts: dict[str, list[str]]) -> None:
        super().__init__("mac")
        self.texts, self.asked = texts, list[str]()

    def run(self, argv: Any, **_: Any) -> Completed:
        self.asked.append(" ".join(argv))
        texts = self.texts[self.asked[-1]]
        return Completed(0, (texts.pop(0) if len(texts) > 1 else texts[0]).encode(), b"")


class _NoWorkers(Stage):
    """A stage whose sessions answer nothing: the order of what is asked around them is looked at."""

    def open_workers(self, **_: Any) -> Any:
        return contextlib.nullcontext()


def mac_stage(texts: dict[str, list[str]]) -> _NoWorkers:
    facts = Facts({}, "arm64", "26.3", "macosx_26_0_arm64", ("ring", "jaccl"), True, True, 1, ())
    spec = RankSpec(Host("mac"), _Mac(texts), ("python",), "/set", ("10.0.0.1",))
    target = Deployment("set", "/set", (DeployedRank(Host("mac"), "python", "/root", "/set"),))
    return _NoWorkers(target, [spec], [read_survey(STUDIO)], [facts])


def test_a_mac_is_asked_before_while_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_macs, "answer", lambda *_: None)
    monkeypatch.setattr(Stage, "wait", lambda *_: None)
    pages = [f"page size of 16384 bytes\nPages wired down: {n}.\n" for n in (100_000, 900_000, 900_000, 100_100)]
    stage = mac_stage({"vm_stat": pages, "pmset -g assertions": ["", ASSERTIONS]})
    found = measure_wired(stage)
    assert [found[f"{when}_bytes"][0] >> 14 for when in ("before", "during", "after")] == [100_000, 900_000, 100_100]
    assert WIRED.judge(found).as_expected
    assert SLEEP.judge(measure_sleep(stage)).as_expected
    [row] = measure_rdma(stage)["hosts"]
    assert (row["jaccl"], row["wheel"]) == (True, "macosx_26_0_arm64")


# Names.

SEEDS = ("mac-of-ada", "ada", "adas-mini.lan", "/Volumes/Adas Disk/moectl", "10.9.8.7")


@pytest.mark.parametrize(
    "text",
    [
        "mac-of-ada: rank 1: [METAL] GPU Timeout",
        "cannot connect to ada@mac-of-ada:2222 at 10.9.8.7:51234",
        "MAC-OF-ADA cannot be reached: fe80::1c2d:3eff:fe4f:5a6b",
        "/Volumes/Adas Disk/moectl/logs/x.log cannot be written; ~/.ssh/id_ada, /Users/ada/x",
        "adas-mini.local said no",
    ],
)
def test_no_name_is_left(text: str) -> None:
    shown = Scrubber(SEEDS).text(text)
    assert not re.search(r"ada|10\.9|fe80|Volumes|5a6b|Users", shown, re.IGNORECASE)


@pytest.mark.parametrize(
    "text", ["12.5 MB/s over 84/84", "Debian GNU/Linux 12", "mlx 0.32.4 at 10:20", "[METAL] Command buffer", "26.3"]
)
def test_other_words_stay(text: str) -> None:
    assert Scrubber(SEEDS).text(text) == text


def test_no_seed_survives_anywhere_in_a_document_and_keys_stay() -> None:
    seeded = {"ada": [{"x": "ada", "y": ["mac-of-ada", 1, None]}, ("10.9.8.7", True)]}
    assert Scrubber(SEEDS).data(seeded) == {"ada": [{"x": "[name]", "y": ["[name]", 1, None]}, ["[name]", True]]}


# Running.


def make_step(measure: Any, **changes: Any) -> HourStep:
    fields = {"name": "x", "question": "?", "seconds": 5.0, "expected": "e", "source": "s", "judge": _judge}
    return HourStep(measure=measure, **{**fields, **changes})


def _judge(data: Data) -> Judgement:
    return Judgement(data["right"], "came")


def test_a_step_ends_in_every_way() -> None:
    stage = mac_stage({})
    assert try_step(make_step(lambda _: {"right": True}), stage).status is Ending.EXPECTED
    assert try_step(make_step(lambda _: {"right": False}), stage).status is Ending.DIFFERS
    assert try_step(make_step(dict, find_obstacle=lambda _: "no"), stage).came == "no"
    assert try_step(make_step(dict), stage, left_s=1.0).status is Ending.SKIPPED

    def fail(_: Stage) -> Data:
        raise CommandFailed("it said /Users/ada", host="mac")

    failed = try_step(make_step(fail), stage)
    assert (failed.status, failed.came) == (Ending.FAILED, "[name]: it said [path]")
    bug = try_step(make_step(lambda _: {}), stage)  # its judgement fails
    assert (bug.status, bug.developers) == (Ending.FAILED, "mend this bug")


def test_a_step_that_takes_too_long_is_ended() -> None:
    stage = mac_stage({})

    class Session:
        closed = False

        def close(self) -> None:
            self.closed = True

    session: Any = Session()

    def measure(stage: Stage) -> Data:
        stage._hold(session)
        while not session.closed:
            pass
        raise MoectlError("the session is closed")

    outcome = try_step(make_step(measure, seconds=0.05), stage)
    assert (outcome.status, outcome.came) == (Ending.FAILED, "it took longer than 0.1 s")


def test_ctrl_c_keeps_the_report_so_far(tmp_path: Path) -> None:
    def stop(_: Stage) -> Data:
        raise KeyboardInterrupt

    path, said = tmp_path / "r.json", list[str]()
    steps = [make_step(lambda _: {"right": True}), make_step(stop, name="y"), make_step(dict, name="z")]
    with pytest.raises(KeyboardInterrupt):
        spend_first_hour(mac_stage({}), path, say=said.append, steps=steps)
    document = json.loads(path.read_text())
    assert [(step["name"], step["status"]) for step in document["steps"]] == [
        ("x", "as expected"),
        ("y", "interrupted"),
    ]
    assert document["finished"] is False


# The whole.


def run_whole(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moectl", "doctor", "--first-hour", "--quick", *words])
    monkeypatch.setattr(sys, "stdin", None)
    return __main__.run()


def deploy_demo(hosts: list[Host], directory: Path) -> None:
    """Record the demo as deployed: every host reads the same set."""
    cut(demo_dir(), directory, nodes=len(hosts), split="hidden")
    ranks = tuple(DeployedRank(host, sys.executable, str(host.dir), str(directory)) for host in hosts)
    envs = tuple(f"{name}={value}" for name, value in rank_env().items())
    write_deployment(Deployment("adas-set", str(directory), ranks, "ring", envs))


def check_report(path: Path, *names: str) -> dict[str, Any]:
    text = path.read_text()
    for name in names:
        assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE), name
    document: dict[str, Any] = json.loads(text)
    status = {step["name"]: step["status"] for step in document["steps"]}
    there = [step.name for step in STEPS if step not in (RDMA, SLEEP, WIRED, KNOB)]
    assert {name for name, word in status.items() if word == "skipped"} == {s.name for s in (RDMA, SLEEP, WIRED, KNOB)}
    assert [name for name in there if status[name] != "says nothing"] == []  # there is no GPU
    assert document["finished"]
    return document


def test_the_whole_hour_over_sshd(
    sshd: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = [Host(sshd.add_alias(f"mac-of-ada{i}"), dir=str(tmp_path / f"node{i}")) for i in range(2)]
    deploy_demo(hosts, tmp_path / "set")
    path = tmp_path / "report.json"
    assert run_whole(monkeypatch, "--report", str(path), "-v") == 0
    out, err = capsys.readouterr()
    document = check_report(
        path,
        "mac-of-ada0",
        "mac-of-ada1",
        "adas-set",
        "127.0.0.1",
        getpass.getuser(),
        socket.gethostname(),
        str(tmp_path),
    )
    assert [host["host"] for host in document["hosts"]] == [0, 1]
    late = [line for line in err.split("\n") if "late, as asked" in line]
    assert len(late) == 2
    assert sum("loads 0 s late" in line for line in late) == 1  # the last rank alone waits
    assert [line.split("  ")[0] for line in out.split("\n") if line[:1].strip()] == [step.name for step in hour.STEPS]
    assert "source: hops of the ring" in out
    assert "1 of 10: Is RDMA there" in err
    assert str(path) in err
    assert not workers()
    assert not processes("moectl.engine")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[HourStep], int]:
    """Return what runs the command on a host that is none, with one step, and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    stage = mac_stage({})
    monkeypatch.setattr("moectl.cli.verbs.doctor.choose_target", lambda *_: stage.target)
    monkeypatch.setattr("moectl.cluster.first_hour.stage.open_stage", lambda *_, **__: contextlib.nullcontext(stage))

    def run(step: HourStep) -> int:
        monkeypatch.setattr(spend_first_hour, "__kwdefaults__", {"steps": [step]})
        return run_whole(monkeypatch, "--report", "r.json")

    return run


def test_what_the_hints_of_the_first_hour_say(
    faked: Callable[[HourStep], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moectl", "doctor", "--report", "r.json"])
    assert __main__.run() == 2
    assert "Hint: add --first-hour" in capsys.readouterr().err
    assert faked(make_step(lambda _: {})) == 3
    assert "Hint: the report says why" in capsys.readouterr().err
    [step] = json.loads(Path("r.json").read_text())["steps"]
    assert (step["status"], step["developers"]) == ("failed", "mend this bug")


def test_ctrl_c_says_where_the_report_is(faked: Callable[[HourStep], int], capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: Stage) -> Data:
        raise KeyboardInterrupt

    assert faked(make_step(stop)) == 130
    assert "What was measured so far is in r.json.\n\nInterrupted." in capsys.readouterr().err


@pytest.mark.netns
@pytest.mark.long
def test_the_whole_hour_on_four_hosts(netns: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = list(netns.hosts())
    deploy_demo(hosts, tmp_path / "set")
    path = tmp_path / "report.json"
    assert run_whole(monkeypatch, "--report", str(path)) == 0
    check_report(path, *(name for host in hosts for name in (host.name, *host.ips)), str(tmp_path))
