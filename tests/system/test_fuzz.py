"""Everything that reads a file or another process, fuzzed: a valid result or one line of ours, never anything else.

A short run of each target, the same every time; `pytest tests/test_fuzz.py --fuzz-seconds 300` gives each five minutes.
API bodies and saved chats have theirs in test_api and test_chat.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest

from moectl import errors
from moectl.cluster import probed_plan
from moectl.cluster.deploy.provision import inspect_host
from moectl.cluster.deploy.task import HostTask
from moectl.cluster.probe import Site, measure_links
from moectl.engine import protocol
from moectl.engine.controller_link import ControllerLink
from moectl.engine.ending import LinkEnded
from moectl.engine.protocol import RunOptions
from moectl.engine.request import Request, Stats
from moectl.errors import MoectlError, RemoteError
from moectl.hosts.hostfile import Host, HostList, parse_host_string, parse_hosts, read_hosts
from moectl.hosts.mlx_hostfile import to_mlx_json
from moectl.hosts.onhost import deploy, files as node
from moectl.hosts.onhost.prelude import ANSWER
from moectl.hosts.remote import Completed, LocalRemote, Process, Remote
from moectl.model.manifest import FileEntry, parse_manifest
from moectl.model.placement import make_placement
from moectl.paths import state_dir
from moectl.planner.measured import Pass, RankSpeed, Speed, read_speeds
from moectl.planner.speed import Prediction
from moectl.session.deployment import DeployedRank, Deployment, deployment_path, find_deployment, write_deployment
from moectl.session.session import RankSpec, Session
from moectl.shards import journal
from moectl.shards.blueprint import draw
from moectl.shards.chat.calls import CallPart
from moectl.shards.source.checkpoint import open_checkpoint
from moectl.shards.source.tensors import ITEM_BYTES
from tests.model.test_manifest import PATH, WHOLE
from tests.support.lone_host import deploy_host
from tests.support.mutation import edit, fuzz
from tests.support.running import wait_for
from tests.support.tiny import write_checkpoint

WORKER = (sys.executable, "-m", "moectl", "worker")
TINY: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 64,
    "n_heads": 2,
    "kv_n_heads": 1,
    "ffn_hidden": 64,
    "n_experts": 4,
    "top_k": 2,
}


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """How long each target is to be fuzzed; 0: the short run."""
    return float(pytestconfig.getoption("fuzz_seconds"))


# Files of the operator's machine.

HOSTS = b"""# four Mac Studios on a 10 GbE switch
mac1  ip=10.0.0.1
mac2  ip=10.0.0.2  memory=120GB             # keep some for the desktop
ada@mac3.local:2222  ip=10.0.0.3,10.0.1.3  python=/opt/venv/bin/python price=3999
[fe80::1%en0]:22  dir=/Volumes/fast/moectl rdma=rdma_en1,rdma_en2,rdma_en3,- chip=m2-ultra
"""
MLX = {
    "backend": "ring",
    "envs": ["A=b c", "B="],
    "hosts": [
        {"ssh": "mac1", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en5"], "memory": "120GB"},
        {"ssh": "ada@mac2", "ips": ["10.0.0.2", "::1"], "rdma": ["rdma_en4", None], "memory": 1 << 37, "dir": "/x y"},
    ],
}


def read_list(path: Path, data: bytes) -> None:
    """Read a hosts file; what it names has to be fit for a command line, and to survive being written."""
    path.write_bytes(data)
    hosts = read_hosts(str(path))
    for host in hosts.hosts:
        assert not set(host.address) & set("'\"`$\\;&<>|(){}*?! \t\n\r\0"), host.address
        assert not host.address.startswith("-")
        assert parse_host_string(host.address).hosts[0].address == host.address
        assert not any(ord(c) < 32 for ip in host.ips for c in ip)
    text = to_mlx_json(HostList(tuple(h for h in hosts.hosts if h.port is None)), resolve=lambda name: "10.0.0.9")
    if json.loads(text)["hosts"]:
        assert [h.address for h in parse_hosts(text).hosts if not h.is_local] == [
            h.address for h in hosts.hosts if h.port is None and not h.is_local
        ]


def test_hosts_files(tmp_path: Path, seconds: float) -> None:
    fuzz("hosts.txt", [HOSTS], lambda data: read_list(tmp_path / "hosts.txt", data), seconds=seconds)


def test_mlx_hostfiles(tmp_path: Path, seconds: float) -> None:
    valid = [json.dumps(MLX).encode(), json.dumps(MLX["hosts"], indent=1).encode()]
    fuzz("MLX hostfile", valid, lambda data: read_list(tmp_path / "hosts.json", data), seconds=seconds)


def test_manifests(tmp_path: Path, seconds: float) -> None:
    def read(data: bytes) -> None:
        (tmp_path / "moectl.json").write_bytes(data)
        from moectl.model.manifest import read_manifest

        manifest = read_manifest(tmp_path)
        for name in manifest.files:
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())
        for rank in range(min(manifest.world_size, 4)):
            assert manifest.files_of(rank).keys() <= manifest.files.keys()
            manifest.placement.experts_of(rank)
        assert parse_manifest(manifest.to_json(), PATH) == manifest

    from dataclasses import replace

    copies = make_placement(WHOLE.structure, "experts", 2, replicas=2)
    held = replace(WHOLE, split="experts", shares=copies.shares, held=copies.held, quantization=None)
    fuzz("manifest", [WHOLE.to_json().encode(), held.to_json().encode()], read, seconds=seconds)


@pytest.mark.parametrize("layout", ["fused", "mlx-quantized"])
def test_safetensors_headers(tmp_path: Path, seconds: float, layout: str) -> None:
    directory = write_checkpoint(tmp_path / "m", layout=layout, files=1, **TINY)
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")

    def read(data: bytes) -> None:
        file.write_bytes(data + whole[length:])
        opened = open_checkpoint(str(directory))
        size = file.stat().st_size
        for tensor in opened.stored.values():
            nbytes = math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0)
            assert 8 <= tensor.offset <= tensor.offset + nbytes <= size

    def read_json(data: bytes) -> None:  # a header that is found, whatever it says
        read(len(data).to_bytes(8, "little") + data)

    fuzz(f"safetensors {layout}", [whole[:length]], read, seconds=seconds / 2)
    fuzz(f"safetensors {layout}, whole JSON", [whole[8:length]], read_json, seconds=seconds / 2)


def test_model_configurations(tmp_path: Path, seconds: float) -> None:
    directory = write_checkpoint(tmp_path / "m", layout="v2", files=2, **TINY)
    for name in ("config.json", "model.safetensors.index.json"):
        whole = (directory / name).read_bytes()

        def read(data: bytes, name: str = name) -> None:
            (directory / name).write_bytes(data)
            draw(open_checkpoint(str(directory)))

        fuzz(name, [whole], read, seconds=seconds / 2)
        (directory / name).write_bytes(whole)


def test_deployment_records(seconds: float) -> None:
    host = Host("mac1", user="ada", port=22, ips=("10.0.0.1",), rdma=(None, "rdma_en1"), memory_bytes=1 << 37)
    ranks = (DeployedRank(host, "/usr/bin/python3", "/root", "/root/shards/x"), DeployedRank(Host("::1")))
    whole = Deployment("x", "/shards/x", ranks, "ring", ("A=b",))
    write_deployment(whole)
    assert find_deployment() == whole

    def read(data: bytes) -> None:
        deployment_path().write_bytes(data)
        found = find_deployment()
        assert found is not None
        assert isinstance(found.missing, tuple)
        for rank in found.ranks:
            assert parse_host_string(rank.host.address).hosts[0].name == rank.host.name

    fuzz("deployment", [deployment_path().read_bytes()], read, seconds=seconds)


def speed() -> Speed:
    rank = RankSpeed(1e-3, 1e9, 1e12)
    return Speed("hidden", (3, 3), Pass(1, 1e-3, 2e-3), Pass(8, 1e-2, 2e-2), {64: 1e-4, 4096: 2e-4}, (rank, rank), 64)


def test_probe_records(seconds: float) -> None:
    whole = {
        "schema": probed_plan.SCHEMA,
        "hosts": ["a", "b"],
        "structure": asdict(WHOLE.structure),
        "quantization": None,
        "dtype_bytes": 4,
        "speeds": [speed().to_json()],
    }
    state_dir().mkdir(parents=True)

    def read(data: bytes) -> None:
        (state_dir() / probed_plan.RECORD).write_bytes(data)
        found = probed_plan.recall(["a", "b"], WHOLE.placement, None, context=64, prompt_tokens=8)
        assert found is None or isinstance(found, Prediction)

    read(json.dumps(whole).encode())
    fuzz("probe record", [json.dumps(whole).encode()], read, seconds=seconds / 2)
    valid = json.dumps([speed().to_json()]).encode()
    fuzz("speeds", [valid], lambda data: read_speeds(data.decode("utf-8", "replace")), seconds=seconds / 2)


def test_journals(tmp_path: Path, seconds: float) -> None:
    entry = FileEntry(7, "0" * 64)
    with journal.Journal(
        tmp_path, {"files": {"common/a": 7, "rank-0/b": 7}, "source": "x"}, {"common/a": entry}
    ) as made:
        made.record("rank-0/b", entry)
    whole = (tmp_path / journal.NAME).read_bytes()

    def read(data: bytes) -> None:
        (tmp_path / journal.NAME).write_bytes(data)
        held = journal.read_journal(tmp_path)
        assert held is not None
        for name, found in held[1].items():
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())
            assert found.bytes >= 0

    fuzz("journal", [whole], read, seconds=seconds)


# The worker protocol, both ends.

ORDERS: list[protocol.Order] = [
    protocol.Start(0, 2, "/shards", ["127.0.0.1"], 30.0, log="/log"),
    protocol.Connect("ring", {"MLX_RANK": "0"}, {"MLX_HOSTFILE": "[]"}),
    protocol.Load(4096),
    protocol.Check(),
    protocol.Beat(),
    protocol.Generate(
        Request(
            1,
            "hello",
            12,
            messages=({"role": "user"},),
            seed=7,
            stop=("x",),
            logit_bias=((5, 1.5),),
            prompt_tokens=(1, 2),
        )
    ),
    protocol.Generate(Request(2, "", 1, messages=({"role": "user", "content": "hi"},))),
    protocol.Generate(
        Request(
            3,
            "",
            1,
            messages=({"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},),
            tools=({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},),
            must_call=("f",),
        )
    ),
    protocol.Profile(4, [1, 2, 3], 2),
    protocol.Cancel(1),
    protocol.Gathered("00ff"),
]
EVENTS: list[protocol.Event] = [
    protocol.Listening({"moectl": "1", "mlx": "2"}, [5000], 4096),
    protocol.Connecting(),
    protocol.Connected(0, 2),
    protocol.Loaded(),
    protocol.Ready("hidden", 4, 256, 512, 4),
    protocol.Alive(123),
    protocol.Prefilled(1, 5),
    protocol.Token(1, 65, "A", -0.5, [(65, "A", -0.5), (66, "B", -1.5)]),
    protocol.Token(1, 66, "", calls=[CallPart(0, "1", "f", "{", ended=False)]),
    protocol.Done(1, "stop", Stats(1, 2, 0.25, 0.5, 0.25, 1 << 30), rest_calls=[CallPart(0, "1", "f", "}")]),
    protocol.Refused.make(2, errors.BadField("no", hint="hint")),
    protocol.Fatal(errors.to_json(errors.PeerLost("gone"))),
    protocol.AllGather("00ff"),
]


def test_worker_messages(seconds: float) -> None:
    def read(data: bytes) -> None:
        for message in protocol.read_messages(io.BytesIO(data)):
            # Right types all through: it can be written, and is the same when it is read again.
            again = protocol.decode(protocol.encode(message))
            assert again == message or "NaN" in str(asdict(message)).replace("nan", "NaN")

    valid = [protocol.encode(m) for m in (*ORDERS, *EVENTS)]
    fuzz("worker protocol", [*valid, b"".join(valid)], read, seconds=seconds)


def test_a_workers_end_of_the_link(seconds: float) -> None:
    """Whatever bytes come, the link tells in the end why it is over, and hands on nothing but orders."""

    def read(data: bytes) -> None:
        down, feed = os.pipe()
        reasons: list[str] = []
        with os.fdopen(down, "rb") as stream:
            held = ControllerLink(stream, io.BytesIO(), on_end=reasons.append)
            with os.fdopen(feed, "wb") as f:
                f.write(data)
            held.join()
        assert len(reasons) == 1
        assert "\n" not in reasons[0]
        with pytest.raises(LinkEnded):
            assert all(isinstance(order, protocol.Order) for order in iter(held.orders.get, None))

    valid = b"".join(map(protocol.encode, ORDERS))
    fuzz("worker's link", [valid], read, seconds=seconds)


# node.py, both ends.


def survey_answer(task: HostTask, root: Path) -> dict[str, Any]:
    request = {
        "root": str(root),
        "directory": f"shards/{task.name}",
        "files": {name: [f.bytes, f.sha256] for name, f in task.files.items()},
        "verify": False,
        "remember": False,
        "packages": ["moectl", "mlx", "mlx-lm"],
        "stamp": "env/moectl-env.json",
        "wheels": {},
        "planned": {},
    }
    return deploy.survey(request)


class FakeHost:
    """A host whose node program answers every command with the same bytes."""

    name = "mac1"
    python = "python3"

    def __init__(self, answer: bytes) -> None:
        self.answer = answer

    def run(self, argv: Sequence[str], **_: Any) -> Completed:
        return Completed(0, self.answer, b"")

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        raise AssertionError

    def put(self, source: Path, destination: str, **_: Any) -> None:
        """Take it."""

    def close(self) -> None:
        """There is nothing to close."""


@pytest.fixture
def task(tmp_path: Path) -> HostTask:
    (tmp_path / "set").mkdir()
    wheel = tmp_path / "moectl.whl"
    wheel.write_bytes(b"wheel")
    entries = {"rank-0/layer-000.safetensors": FileEntry(4, "0" * 64), "moectl.json": FileEntry(2, "1" * 64)}
    versions = {"moectl": "1", "mlx": "2", "mlx-lm": "3"}
    wheels = {wheel: FileEntry(5, "2" * 64)}
    host = Host("mac1")
    return HostTask(0, host, tmp_path / "set", "tiny", entries, versions, "code", wheels, dry_run=False, verify=False)


def test_what_a_host_answers_to_deploy(
    task: HostTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    answer = survey_answer(task, tmp_path / "root")
    # As if all were installed there: what follows is the comparison and the push.
    answer |= {"stamp": task.stamp, "env": True, "free": 1 << 40, "wheels": {"moectl.whl": 0}}
    whole = json.dumps(answer).encode()
    failures: list[dict[str, Any]] = [
        {"error": "os", "reason": "no", "path": "/x"},
        {"error": "full", "free": 1, "needed": 2},
        {"error": "mismatch", "sha256": "0" * 64, "kept": 1},
        {"error": "busy"},
    ]

    def read(data: bytes) -> None:
        host = FakeHost(b"motd\n" + ANSWER + data + b"\n")
        # Where it is used: under its first name it would be that of no caller, and "mac1" would be looked for.
        monkeypatch.setattr("moectl.cluster.deploy.provision.make_remote", lambda _: cast(Remote, host))
        try:
            inspect_host(task, cast(Remote, host))
            deploy_host(task)
        except MoectlError:
            if data not in valid[1:]:
                raise

    valid = [whole, *(json.dumps(f).encode() for f in failures)]
    fuzz("answers to deploy", valid, read, seconds=seconds)


def test_what_node_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Whatever is asked, the program on a host ends with an answer, and writes nowhere but where it was told to."""
    task_files = {"rank-0/a.safetensors": [4, "0" * 64], "moectl.json": [2, "1" * 64]}
    inside = tmp_path / "inside"
    (inside / "set").mkdir(parents=True)
    (inside / "set" / "moectl.json").write_text("{}")
    base = {"root": str(inside), "directory": "set", "files": task_files, "verify": True, "remember": True}
    survey = base | {"stamp": "env/stamp", "packages": ["mlx"], "wheels": {"a.whl": [1, "0" * 64]}}
    record = {"directory": str(inside / "set"), "files": {"moectl.json": "1" * 64}}
    monkeypatch.setattr(deploy, "end_with_stdin", lambda end: None)
    answers: list[dict[str, Any]] = []
    for program in (deploy, node):
        monkeypatch.setattr(program, "tell", answers.append)
    monkeypatch.chdir(inside)

    def ask(command: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            answers.clear()
            stdin = type("Stdin", (), {"buffer": io.BytesIO(data)})
            monkeypatch.setattr(sys, "stdin", stdin)
            (deploy if command == "survey" else node)._main(command)
            assert len(answers) == 1
            assert json.dumps(answers[0])

        return read

    fuzz("node survey", [json.dumps(survey).encode()], ask("survey"), seconds=seconds / 3)
    fuzz("node record", [json.dumps(record).encode()], ask("record"), seconds=seconds / 3)

    def receive(data: bytes) -> None:
        source = io.BytesIO(data)
        monkeypatch.setattr(
            node, "_read_stdin", lambda count, *_: source.read(min(count, 4096) if source.tell() else 70)
        )
        answers.clear()
        node._main("receive")
        assert all(json.dumps(answer) for answer in answers)

    header = b'{"path": "got", "bytes": 5, "sha256": "%s"}' % (b"0" * 64)
    fuzz("node receive", [header.ljust(69) + b"\nhello"], receive, seconds=seconds / 3)
    assert {p.name for p in tmp_path.iterdir()} == {"inside"}


def test_what_links_answer(seconds: float) -> None:
    def read(data: bytes) -> None:
        text = b"motd\n" + ANSWER + data + b"\n"

        class Listener(LocalRemote):
            def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Any:
                return _Said(text)

            def run(self, argv: Sequence[str], **_: Any) -> Completed:
                return Completed(0, text, b"")

        sites = [Site(Host(name), Listener(name), "python3", ("127.0.0.1",)) for name in ("a", "b")]
        rtt, _ = measure_links(sites)
        assert isinstance(rtt[0][1], float)

    whole = {"port": 5000, "rtt_s": 0.001, "out_bytes_s": 1e9, "in_bytes_s": 1e9}
    fuzz("links", [json.dumps(whole).encode()], read, seconds=seconds)


class _Said:
    def __init__(self, text: bytes) -> None:
        self.stdin, self.stdout, self.stderr = io.BytesIO(), io.BytesIO(text), io.BytesIO()

    def wait(self, timeout_s: float | None = None) -> int:
        return 0

    def kill(self) -> None:
        """It has ended."""

    def close(self) -> None:
        """It has ended."""


# Real processes that are told nonsense.

NONSENSE = {
    "noise": b"Welcome to mac1!\n",
    "bytes": bytes(range(256)) * 4,
    "half a line": protocol.encode(ORDERS[0])[:40],
    "an order of wrong types": b'{"type": "Start", "rank": "0", "world_size": {}}\n',
    "another order first": protocol.encode(protocol.Load()),
    "an event": protocol.encode(protocol.Connecting()),
    "deep": b"[" * 200_000 + b"\n",
    "a shard set that is none": protocol.encode(protocol.Start(0, 1, "/nowhere\n$(id)", ["127.0.0.1"], 5.0)),
    "an address that is none": protocol.encode(protocol.Start(0, 1, "\0", ["x\n"], 5.0)),
}


@pytest.mark.parametrize("said", NONSENSE.values(), ids=NONSENSE.keys())
def test_a_real_worker_that_is_told_nonsense_ends_with_one_line(said: bytes) -> None:
    done = subprocess.run(WORKER, input=said, capture_output=True, timeout=60, check=False)
    _check_worker(done)


def test_a_real_worker_ends_at_a_line_of_100_mb() -> None:
    script = "import sys\nfor _ in range(100): sys.stdout.buffer.write(b'x' * (1 << 20))"
    feeder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    done = subprocess.run(WORKER, stdin=feeder.stdout, capture_output=True, timeout=60, check=False)
    feeder.kill()
    feeder.wait()
    assert feeder.stdout is not None
    feeder.stdout.close()
    _check_worker(done)
    assert b"a line of more than" in done.stderr


def _check_worker(done: subprocess.CompletedProcess[bytes]) -> None:
    assert done.returncode > 0
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"ends: " in done.stderr
    assert done.stderr.count(b"\n") <= 3, done.stderr.decode()
    for line in done.stdout.splitlines(keepends=True):
        protocol.decode(line)


WORKERS_NONSENSE = {
    "noise": "print('Welcome to mac1!')",
    "nothing": "sys.exit()",
    "half a line": 'sys.exit(sys.stdout.write(\'{"type": "Listening", "versions"\'))',
    "another kind": 'print(\'{"type": "Beat"}\')',
    "another event": 'print(\'{"type": "Connecting"}\')',
    "wrong types": 'print(\'{"type": "Listening", "versions": [], "ports": {}}\')',
    "wrong ports": 'print(\'{"type": "Listening", "versions": {}, "ports": []}\')',
    "unknown kind": 'print(\'{"type": "Fatal", "error": {"kind": "__name__", "message": "a\\\\nb", "hint": 5}}\')',
    "a line of 100 MB": "[sys.stdout.write('x' * (1 << 20)) for _ in range(100)]",
}


@pytest.mark.parametrize("said", WORKERS_NONSENSE.values(), ids=WORKERS_NONSENSE.keys())
def test_a_session_that_hears_nonsense_names_the_host(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(
        "moectl.session.worker_link.EXIT_GRACE_S", 0.5
    )  # no process here ends with its link when its output is full
    program = f"import sys, time\ntry:\n    {said}\n    sys.stdout.flush()\nexcept OSError:\n    pass\nsys.stdin.read()"
    good = 'import sys\nprint(\'{"type": "Listening", "versions": {}, "ports": [5000]}\', flush=True)\nsys.stdin.read()'
    ranks = [
        RankSpec(Host(name), LocalRemote(), (sys.executable, "-c", text), "", ("127.0.0.1",))
        for name, text in (("mac1", good), ("mac2", program))
    ]
    session = Session(ranks, RunOptions(start_timeout_s=20))
    try:
        with pytest.raises(MoectlError) as caught:
            session.start()
    finally:
        session.close()
    assert caught.value.host == "mac2"
    assert "\n" not in caught.value.message
    wait_for(lambda: threading.active_count() <= before)  # it leaves none of its own


@pytest.mark.parametrize("cut", [2, 20, 60])
def test_no_part_of_a_prompt_is_told(cut: int) -> None:
    line = protocol.encode(protocol.Generate(Request(1, "my secret prompt", 5)))
    for part in (line[:-cut], line[cut:]):
        with pytest.raises(RemoteError) as caught:
            protocol.decode(part)
        assert "secret" not in caught.value.message


def test_the_fuzzer_finds_what_is_there_to_find() -> None:
    """It is no test that cannot fail: a reader with a defect is caught, by either of its ways."""

    def read(data: bytes) -> None:
        if data.count(b"[") > 2:
            raise IndexError

    with pytest.raises((IndexError, AssertionError)):
        fuzz("defect", [b'{"a": [1]}'], read)
    assert edit(b"abcd", [(0.5, 1, b"X")]) == b"abXd"
