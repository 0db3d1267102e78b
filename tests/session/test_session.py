"""A session of real worker processes on this machine: answers, cancels, and failing as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.engine.controller_link import ControllerLink
from moectl.engine.group import own_versions, side_channel
from moectl.engine.protocol import (
    LINK_LOST,
    SILENCE_S,
    AllGather,
    Done,
    Gathered,
    Prefilled,
    RunOptions,
    Token,
    decode,
    encode,
)
from moectl.engine.request import Request
from moectl.errors import (
    MoectlError,
    NotDeployed,
    RanksDisagree,
    RemoteError,
    Stalled,
    Unreachable,
    UsageError,
    VersionMismatch,
)
from moectl.hosts.hostfile import Host
from moectl.hosts.onhost.workers import read_marks
from moectl.hosts.remote import LocalProcess, LocalRemote
from moectl.session.session import RankSpec, Session
from tests.engine.test_lockstep import cut_case
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.ring import rank_env
from tests.support.running import wait_for
from tests.support.tiny import write_checkpoint
from tests.support.words import ask_chat

WORKER = (sys.executable, "-m", "moectl", "worker")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    return cut_case(source, tmp_path_factory.mktemp("shards") / "two", "hidden", (2, 4), 16)


def specs(shards: Path, argv: tuple[str, ...] = WORKER, count: int = 2, **env: str) -> list[RankSpec]:
    return [
        RankSpec(Host(f"host{rank}"), LocalRemote(), argv, str(shards), ("127.0.0.1",), rank_env(**env))
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def session(shards: Path) -> Iterator[Session]:
    with Session(specs(shards)) as session:
        yield session


def worker_pids() -> set[int]:
    """Return the workers that this test process started, running or not yet reaped."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()[1:]]
    return {int(r[0]) for r in rows if int(r[1]) == os.getpid() and "moectl worker" in r[3] and "Z" not in r[2]}


def text_of(events: list[Token | Done]) -> str:
    return "".join(e.text if isinstance(e, Token) else e.rest for e in events)


def test_an_answer_streams_and_repeats(session: Session) -> None:
    first = list(session.generate(ask_chat(1, "hello", 12)))
    again = list(session.generate(ask_chat(2, "hello", 12)))
    assert text_of(first) == text_of(again)
    done = first[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.stats.completion_tokens) == ("length", 12)
    assert len([e for e in first if isinstance(e, Token)]) == 12
    assert done.stats.prompt_tokens == 3 + len("user\nhello\nassistant\n")  # three special tokens
    assert 0 < done.stats.prompt_s <= done.stats.ttft_s


def test_raw_prompts_have_no_template(session: Session) -> None:
    done = list(session.generate(Request(3, "hello", 1)))[-1]
    assert isinstance(done, Done)
    assert done.stats.prompt_tokens == 5


def test_system_prompts_count(session: Session) -> None:
    plain = list(session.generate(ask_chat(4, "hi", 4)))[-1]
    with_system = list(session.generate(ask_chat(5, "hi", 4, system="be brief")))[-1]
    assert isinstance(plain, Done)
    assert isinstance(with_system, Done)
    assert with_system.stats.prompt_tokens > plain.stats.prompt_tokens


def test_seeds_repeat_and_differ(session: Session) -> None:
    def sample(number: int, seed: int) -> str:
        request = Request(number, "hello", 16, temperature=1.5, top_p=0.95, seed=seed)
        return text_of(list(session.generate(request)))

    assert sample(6, 1) == sample(7, 1)
    assert sample(8, 1) != sample(9, 2)


def test_refusals_leave_the_session_working(session: Session) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        list(session.generate(Request(10, "", 4)))
    with pytest.raises(UsageError, match="the model's context is 512"):
        list(session.generate(Request(11, "long " * 200, 4)))
    assert isinstance(list(session.generate(Request(12, "hello", 2)))[-1], Done)


def test_answers_end_at_the_models_context(session: Session) -> None:
    done = list(session.generate(Request(13, "x" * 500, 100)))[-1]
    assert isinstance(done, Done)
    assert (done.finish_reason, done.stats.completion_tokens) == ("length", 12)


def test_cancel_ends_an_answer_soon(session: Session) -> None:
    events: list[Token | Done] = []
    for event in session.generate(Request(14, "hello", 400)):
        events.append(event)
        if len(events) == 5:
            session.cancel(14)
    done = events[-1]
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    assert done.stats.completion_tokens < 300
    again = list(session.generate(ask_chat(15, "hello", 12)))
    assert isinstance(again[-1], Done)


def test_a_slow_launch_keeps_the_links_alive(shards: Path) -> None:
    class Slow(LocalRemote):
        def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> LocalProcess:
            time.sleep(SILENCE_S + 1)
            return super().start(argv, env=env)

    first, second = specs(shards)
    with Session([first, replace(second, remote=Slow())]) as session:
        assert isinstance(list(session.generate(Request(1, "hello", 2)))[-1], Done)


def test_a_session_keeps_its_promise_and_its_log_and_leaves_no_process(shards: Path, tmp_path: Path) -> None:
    """Answers end where the room ends that was promised; the log has no prompts; closing ends workers that compute."""
    before = worker_pids()
    logs = [str(tmp_path / "logs" / f"two-rank-{i}.log") for i in range(2)]
    ranks = [replace(spec, log=log) for spec, log in zip(specs(shards), logs, strict=True)]
    with Session(ranks, kv_tokens=500) as session:
        assert session.kv_tokens == 500
        started = worker_pids() - before
        assert len(started) == 2
        marks = read_marks(str(tmp_path))  # by which others see them, whatever ps calls their python
        assert (set(marks), sorted(marks.values())) == (started, [[log] for log in logs])
        list(session.generate(Request(1, "a secret prompt", 3)))
        done = list(session.generate(Request(2, "x" * 490, 100)))[-1]
        assert isinstance(done, Done)
        assert (done.finish_reason, done.stats.completion_tokens) == ("length", 10)
        next(session.generate(Request(3, "hello", 400)))
    assert not worker_pids() & started
    assert read_marks(str(tmp_path)) == {}
    text = Path(logs[0]).read_text()
    assert "rank 0 of 2 starts" in text
    assert "joined over ring as rank 0 of 2" in text
    assert "request 1: length after 3 tokens" in text
    assert "secret" not in text


class Watched(LocalRemote):
    """This machine, and what was started on it; `gate` holds back the start of the second process."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[LocalProcess] = []
        self.asked = threading.Event()
        self.gate = threading.Event()

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> LocalProcess:
        if self.started:
            self.asked.set()
            assert self.gate.wait(20)
        self.started.append(super().start(argv, env=env))
        return self.started[-1]

    def is_gone(self) -> bool:
        """Whether all that was started has ended."""
        try:
            return all(process.wait(0) < 0 for process in self.started)
        except TimeoutError:
            return False


def deaf(remote: LocalRemote) -> Session:
    """Return a session whose workers do not end with their link, as frozen ones do not."""
    return Session([replace(spec, remote=remote) for spec in specs(Path("/nowhere"), ("sleep", "1000"), count=3)])


def start_closed(session: Session, said: list[str]) -> threading.Thread:
    def start() -> None:
        try:
            session.start()
        except MoectlError as error:
            said.append(error.message)

    thread = threading.Thread(target=start)
    thread.start()
    return thread


def test_every_closer_waits_until_the_workers_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.session.worker_link.EXIT_GRACE_S", 0.5)
    remote, said = Watched(), list[str]()
    remote.gate.set()
    session = deaf(remote)
    starting = start_closed(session, said)
    wait_for(lambda: len(remote.started) == 3)
    gone: list[bool] = []

    def close() -> None:
        session.close()
        gone.append(remote.is_gone())

    closers = [threading.Thread(target=close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in (*closers, starting):
        thread.join(20)
    assert gone == [True] * 3
    assert said == ["the session is closed"]


def test_what_starts_while_it_is_closed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.session.worker_link.EXIT_GRACE_S", 0.1)
    remote, said = Watched(), list[str]()
    session = deaf(remote)
    starting = start_closed(session, said)
    assert remote.asked.wait(20)
    session.close()
    remote.gate.set()
    starting.join(20)
    assert said == ["the session is closed"]
    assert len(remote.started) == 2
    assert remote.is_gone()


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_rank_ends_all_and_is_named(shards: Path, victim: int) -> None:
    before = worker_pids()
    named = f"host{victim}: rank {victim}: the worker was killed by signal 9 while generating"
    with Session(specs(shards)) as session:
        pids = sorted(worker_pids() - before)
        answer = session.generate(Request(1, "hello", 400))
        next(answer)
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(RemoteError, match=named) as caught:
            list(answer)
    assert caught.value.exit_code == 6
    assert worker_pids() == before


def test_a_worker_without_shards_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(MoectlError, match=r"rank 0: .* is not a shard set") as caught,
        Session(specs(tmp_path, count=1)),
    ):
        pass
    assert caught.value.exit_code == 8


def test_shards_for_another_number_of_ranks(shards: Path) -> None:
    with pytest.raises(NotDeployed, match="is cut for 2 ranks, not 1"):
        Session(specs(shards, count=1)).__enter__()


def test_a_damaged_shard_is_found(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", shards, copy], check=True)
    file = copy / "rank-1" / "layer-000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(MoectlError, match=r"host1: rank 1: rank-1/layer-000\.safetensors has") as caught:
        Session(specs(copy)).__enter__()
    assert caught.value.exit_code == 7


def test_a_missing_program_is_named(shards: Path) -> None:
    with pytest.raises(MoectlError, match="cannot start /nowhere/python"):
        Session(specs(shards, argv=("/nowhere/python", "-m", "moectl"))).__enter__()


def test_a_program_that_is_no_worker(shards: Path) -> None:
    with pytest.raises(RemoteError, match="not a message of moectl's worker protocol: 'hello'"):
        Session(specs(shards, argv=("echo", "hello"))).__enter__()


# A stand-in for a worker whose backend is not here: it speaks the protocol and calculates nothing.
STAND_IN = """
import json, os, sys, time
def tell(kind_, /, **fields): print(json.dumps({"type": kind_, **fields}), flush=True)
def obey(kind, order):
    if kind == "Start":
        pipeline = {"split": "layers", "prefill_step": 64 * (1 + order["rank"])} if MODE == "pipeline" else {}
        tell("Listening", versions=VERSIONS, ports=[9], **pipeline)
    elif kind == "Connect":
        tell("Connecting")
        rank = order["env"]["MLX_RANK"]
        if MODE == "pipeline":
            print(order["backend"], file=sys.stderr, flush=True)
        if MODE in ("quick", "pipeline", "dissents", "stalls", "freezes"):
            tell("Connected", rank=int(rank), world_size=3)
        elif MODE == "blames":
            error = {"kind": "Unreachable", "message": "cannot join the ring group: [ring] the neighbour has gone"}
            tell("Fatal", error=error)
        elif MODE == "dies":
            time.sleep(0.3)
            os.kill(os.getpid(), 9)
        elif MODE == "gather":
            tell("AllGather", data=(f"<{rank}>" * 2).encode().hex())
    elif kind == "Gathered":
        print(bytes.fromhex(order["data"]).decode(), file=sys.stderr, flush=True)
        tell("Connected", rank=0, world_size=3)
    elif kind == "Load" and MODE == "dissents":
        tell("Fatal", error={"kind": "RanksDisagree", "message": "chose other experts than the others"}, rank=2)
    elif kind == "Load":
        if MODE == "pipeline":
            print("step", order["prefill_step"], file=sys.stderr, flush=True)
        tell("Loaded")
    elif kind == "Check" and MODE != "stalls":
        tell("Ready", split="hidden", bits=4, vocab_size=9, max_seq_len=9, top_k=1)
        if MODE == "freezes":
            time.sleep(1000)
    elif kind == "Beat":
        tell("Alive", memory_bytes=1)
    elif kind == "Generate":
        tell("Prefilled", id=order["request"]["id"], tokens=1)
for line in sys.stdin:
    order = json.loads(line)
    obey(order.pop("type"), order)
"""


def stand_in(mode: str, versions: dict[str, str] | None = None) -> tuple[str, ...]:
    return (
        sys.executable,
        "-c",
        STAND_IN.replace("VERSIONS", repr(versions or own_versions())).replace("MODE", repr(mode)),
    )


def stand_ins(*modes: str) -> list[RankSpec]:
    """Return ranks that stand in, in these modes; there is no shard set."""
    ranks = specs(Path("/nowhere"), count=len(modes))
    return [replace(spec, argv=stand_in(mode)) for spec, mode in zip(ranks, modes, strict=True)]


def test_ranks_may_connect_while_others_are_not_yet_ready_to() -> None:
    with Session(stand_ins("quick", "quick", "quick")) as session:
        assert session.model.split == "hidden"


def test_who_died_is_named_and_not_who_lost_it_while_connecting() -> None:
    with pytest.raises(RemoteError, match=r"^host1: rank 1: the worker was killed by signal 9 while connecting$"):
        Session(stand_ins("blames", "dies")).__enter__()


def test_who_lost_another_is_named_where_nobody_died() -> None:
    with pytest.raises(
        Unreachable, match=r"host0: rank 0: cannot join the ring group: \[ring\] the neighbour has gone"
    ):
        Session(stand_ins("blames", "quick")).__enter__()


def submit_much(session: Session) -> threading.Thread:
    """Ask for what does not fit into a pipe; return the thread that does."""
    request = Request(1, "x" * 1_000_000, 4)
    thread = threading.Thread(target=session.submit, args=(request,), daemon=True)
    thread.start()
    return thread


def test_who_reads_nothing_keeps_nothing_from_the_others() -> None:
    with Session(stand_ins("freezes", "quick"), step_timeout_s=20) as session:
        sending = submit_much(session)
        assert next(session.events()) == Prefilled(1, 1)  # the other one's
        sending.join(20)
        assert not sending.is_alive()


def test_who_does_not_answer_is_named_and_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a long order is on its way, so that it is not long enough to take it for dead."""
    monkeypatch.setattr("moectl.session.session.BEAT_S", 0.1)
    with Session(stand_ins("freezes", "quick"), step_timeout_s=1) as session:
        submit_much(session)
        events = session.events()
        next(events)
        with pytest.raises(RemoteError, match=r"^host0: rank 0: the worker has not answered for") as caught:
            next(events)
        with pytest.raises(RemoteError) as again:
            list(session.generate(Request(2, "hello", 1)))
        assert again.value is caught.value  # it stays over
    with pytest.raises(MoectlError):
        list(session.generate(Request(3, "hello", 1)))


class Slept:
    """Stands in for what tells that this machine slept a moment ago."""

    slept_s = 60.0

    def beat(self) -> None:
        pass


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("kill -9 $$", "killed by signal 9 while starting"),
        ("exit 3", "exit code 3 while starting"),
        ("exit 1", "ended with exit code 1"),
        (f"exit {LINK_LOST}", "slept, or was stopped, for 60 s"),
    ],
)
def test_a_sleep_explains_no_other_death(script: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moectl.session.session.Sleep", Slept)
    with pytest.raises(RemoteError, match=said):
        Session(specs(Path("/nowhere"), ("sh", "-c", script), count=1)).__enter__()


def test_what_stalls_after_loading_has_the_time_of_a_step() -> None:
    for patience, said in ((1, "0.5 s"), (2, "1 s")):
        words = f"host1: rank 1: no answer while computing for the first time within {said} .waiting for host1, host2."
        with pytest.raises(Stalled, match=words):
            Session(stand_ins("quick", "stalls", "stalls"), step_timeout_s=0.5, patience=patience).__enter__()


def test_the_rank_that_the_others_accuse_is_named() -> None:
    ranks = stand_ins("quick", "dissents", "quick")
    with pytest.raises(RanksDisagree, match=r"^host2: rank 2: chose other experts than the others$"):
        Session(ranks).__enter__()


def test_a_peer_that_never_joins_is_bounded(shards: Path) -> None:
    before = worker_pids()
    ranks = specs(shards)
    ranks[1] = replace(ranks[1], argv=stand_in("silent"))
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=r"no answer while connecting within 6 s \(waiting for host0, host1\)"):
        Session(ranks, RunOptions(start_timeout_s=6)).__enter__()
    assert time.monotonic() - begin < 60  # bounded at all is the point
    assert worker_pids() == before


def test_jaccl_exchanges_its_metadata_over_the_link(shards: Path) -> None:
    devices = [(None, "rdma_en3", "rdma_en4"), ("rdma_en2", None, "rdma_en4"), ("rdma_en2", "rdma_en3", None)]
    heard: list[str] = []
    ranks = [
        replace(spec, argv=stand_in("gather"), host=Host(f"host{i}", rdma=devices[i]))
        for i, spec in enumerate(specs(shards, count=3))
    ]
    with Session(ranks, backend="jaccl", on_log=lambda host, line: heard.append(line)):
        pass
    assert heard == ["<0><0><1><1><2><2>"] * 3


@pytest.mark.parametrize(
    ("told", "said", "hint"),
    [
        (
            ("macos='26.2', jaccl=True", "macos='26.3.1', jaccl=True"),
            "RDMA between macOS 26.2 and a newer one hangs .*: 26.2 on host0, 26.3 on host1",
            "sudo softwareupdate -ia -R on those with 26.2, or use --backend ring",
        ),
        (
            ("macos='26.3', jaccl=True", "macos='26.3', jaccl=False, wheel='macosx_15_0_arm64'"),
            r"host1: its mlx is the wheel for macOS 15, which has no RDMA \(JACCL\)",
            "moectl deploy, which installs the one for macOS 26; until then use --backend ring",
        ),
    ],
)
def test_rdma_that_cannot_work_is_refused_before_anyone_joins(
    shards: Path, told: tuple[str, str], said: str, hint: str
) -> None:
    devices = [(None, "rdma_en3"), ("rdma_en2", None)]
    heard: list[str] = []
    ranks = []
    for rank, (spec, fields) in enumerate(zip(specs(shards), told, strict=True)):
        python, dash_c, text = stand_in("gather")
        text = text.replace("ports=[9]", f"ports=[9], {fields}").replace(
            '"Connect":', '"Connect" and not print("joins", file=sys.stderr):'
        )
        ranks.append(replace(spec, argv=(python, dash_c, text), host=Host(f"host{rank}", rdma=devices[rank])))
    with pytest.raises(VersionMismatch, match=said) as caught:
        Session(ranks, backend="jaccl", on_log=lambda host, line: heard.append(line)).__enter__()
    assert (caught.value.hint, heard) == (hint, [])


def test_a_pipeline_goes_over_the_ring_and_reads_as_its_slowest_rank_can() -> None:
    heard: list[str] = []
    devices = [(None, "rdma_en3"), ("rdma_en2", None)]
    ranks = [replace(r, host=Host(f"h{i}", rdma=devices[i])) for i, r in enumerate(stand_ins("pipeline", "pipeline"))]
    with Session(ranks, backend="auto", on_log=lambda host, line: heard.append(line)):
        pass
    assert sorted(heard) == ["ring", "ring", "step 64", "step 64"]


def test_a_jaccl_exchange_that_stalls_is_bounded(shards: Path) -> None:
    devices = [(None, "rdma_en3"), ("rdma_en2", None)]
    ranks = [
        replace(spec, argv=stand_in(mode), host=Host(f"host{i}", rdma=devices[i]))
        for i, (spec, mode) in enumerate(zip(specs(shards), ("gather", "silent"), strict=True))
    ]
    with pytest.raises(Unreachable, match="no answer while connecting within 1 s"):
        Session(ranks, RunOptions(start_timeout_s=1), backend="jaccl").__enter__()


def test_the_workers_side_of_the_exchange() -> None:
    orders_read, orders_write = os.pipe()
    events_read, events_write = os.pipe()
    with (
        os.fdopen(orders_read, "rb") as down,
        os.fdopen(orders_write, "wb") as controller,
        os.fdopen(events_read, "rb") as events,
        os.fdopen(events_write, "wb") as up,
    ):
        link = ControllerLink(down, up, on_end=lambda reason: None)
        all_gather = side_channel(link)(0, 2)
        controller.write(encode(Gathered(b"abcdef".hex())))
        controller.flush()
        assert all_gather(b"abc-and-more", 3) == b"abcdef"
        assert decode(events.readline()) == AllGather(b"abc".hex())
        controller.close()
        link.join()


def test_versions_that_differ_are_refused_with_all_differences(shards: Path) -> None:
    ours = own_versions()
    ranks = specs(shards, count=4)
    theirs = [ours, {**ours, "moectl": "0.0.9", "mlx": "0.1"}, {**ours, "mlx": "0.1"}, {**ours, "python": "3.99.0"}]
    for rank, versions in enumerate(theirs):
        ranks[rank] = replace(ranks[rank], argv=stand_in("silent", versions))
    with pytest.raises(VersionMismatch) as caught:
        Session(ranks).__enter__()
    assert caught.value.message == (
        f"versions differ: moectl {ours['moectl']} on host0 and host2 and host3, 0.0.9 on host1; "
        f"mlx {ours['mlx']} on host0 and host3, 0.1 on host1 and host2"
    )
    assert (caught.value.exit_code, caught.value.hint) == (6, "moectl deploy")


def test_a_worker_ends_when_its_controller_vanishes_with_all_pipes() -> None:
    """As kill -9 of the controller or a cut SSH connection leaves it: nobody reads its log any more."""
    process = start_worker()
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    assert process.wait(20) == LINK_LOST


def start_worker() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **rank_env()}
    )


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda p: p.stdin.close(), b"the controller closed the link"),
        (lambda p: None, b"nothing heard from the controller for 3 s"),
        (lambda p: (p.stdin.write(b"rubbish\n"), p.stdin.flush()), b"not a message"),
    ],
)
def test_a_worker_ends_with_its_link(act: Callable[[subprocess.Popen[bytes]], object], reason: bytes) -> None:
    process = start_worker()
    act(process)
    assert process.wait(20) == LINK_LOST
    assert process.stderr is not None
    assert reason in process.stderr.read()
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()
