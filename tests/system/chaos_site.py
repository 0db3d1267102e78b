"""Where chaos strikes: four namespaced hosts with the demo model deployed, and a controller that is always there again.

It starts, looks and counts; it breaks nothing (`chaos_faults`) and asks nothing (`chaos_load`). The controller is a
`moectl serve` of its own; whenever it ends, another one is started, as a user would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from moectl.demo import demo_dir
from tests.support.netns import Cluster, Node
from tests.support.ring import build_preload, rank_env
from tests.support.sshd import find_free_port

RANKS = 4
RING_DELAY_US = 1500  # an answer of 40 tokens takes some two seconds: long enough to be struck in the middle
LOG_LINES = 60
AGAIN_S = 1.0  # between the end of a controller and the start of the next
_ESTABLISHED, _CLOSE_WAIT, _LISTEN = "01", "08", "0A"


class Timeline:
    """What happened when, in seconds since the beginning; many threads write it."""

    def __init__(self, *, aloud: bool = False) -> None:
        self.entries: list[tuple[float, str]] = []
        self._began_s = time.monotonic()
        self._aloud = aloud
        self._lock = threading.Lock()

    def now_s(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self._began_s

    def note(self, text: str) -> None:
        """Write something down."""
        with self._lock:
            self.entries.append((self.now_s(), text))
            if self._aloud:
                sys.stderr.write(f"{self.now_s():8.2f} {text}\n")

    def last(self, count: int) -> list[str]:
        """Return the newest entries as text."""
        return [f"{s:8.2f} {text}" for s, text in self.entries[-count:]]


@dataclass(slots=True)
class Life:
    """One controller process, from its start to its end."""

    process: subprocess.Popen[str]
    began_s: float
    served_s: float | None = None  # when it was first seen well
    ended_s: float | None = None
    killed: bool = False  # by a fault, so that its clients get no last word
    asked_to_end: bool = False
    said: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=LOG_LINES))  # its stderr, and when


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP socket in a host's network."""

    port: int
    peer_port: int
    state: str  # as the kernel numbers them
    inode: str


class Site:
    """The hosts, the deployment and the controller; use `run_site`."""

    def __init__(self, cluster: Cluster, directory: Path, timeline: Timeline, max_restarts: int) -> None:
        self.cluster = cluster
        self.timeline = timeline
        self.directory = directory
        self.lives: list[Life] = []
        self.max_restarts = max_restarts
        self.port = find_free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.clock = directory / "clock"  # the controller's; each node has its own in /node
        self.temporary = directory / "tmp"
        self.runtime = Path(tempfile.mkdtemp(prefix="moechaos"))  # names of Unix sockets are short
        self.problems: list[str] = []  # ends of controllers that were not as they should
        self._leaving = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._http = httpx2.Client(base_url=self.url, timeout=5.0)

    # The controller.

    def deploy(self) -> None:
        """Cut the demo model for four hosts and bring it there."""
        self.temporary.mkdir()
        self.clock.write_bytes(bytes(8))
        for node in self.cluster.nodes:
            (node.directory / "tmp").mkdir(exist_ok=True)
            (node.directory / "clock").write_bytes(bytes(8))
        hosts = [
            {"ssh": h.name, "ips": list(h.ips), "python": h.python, "dir": h.dir, "rdma": []}
            for h in self.cluster.hosts(dir="/node/chaos")
        ]
        own = {"TMPDIR": "/node/tmp", "JUMPCLOCK_FILE": "/node/clock"}
        envs = {**rank_env(RING_DELAY_US=str(RING_DELAY_US)), **own, "LD_PRELOAD": _preloads()}
        self.hostfile.write_text(json.dumps({"envs": [f"{k}={v}" for k, v in envs.items()], "hosts": hosts}))
        at = ("--hostfile", str(self.hostfile))
        for words in (("shard", str(demo_dir()), *at, "--split", "hidden", "-q"), ("deploy", *at, "--no-check")):
            subprocess.run([*_MOECTL, *words], env=self._env(), check=True, capture_output=True, text=True)

    @property
    def hostfile(self) -> Path:
        return self.directory / "hosts.json"

    @property
    def life(self) -> Life:
        """The newest controller."""
        return self.lives[-1]

    def start(self) -> None:
        """Start the first controller, and from now on another one whenever it ends."""
        self._keeper.start()

    def stop(self) -> None:
        """End the controller as a user would, for good."""
        self._leaving.set()
        if self.lives and self.life.process.poll() is None:
            self.life.asked_to_end = True
            self.life.process.send_signal(signal.SIGCONT)
            self.life.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.life.process.wait(60)
        if self.lives and self.life.process.poll() is None:
            self.problems.append("the controller did not end within 60 s after Ctrl-C")
            self.life.process.kill()
        self._keeper.join()

    def health(self) -> dict[str, Any] | None:
        """Return what /health says, with its HTTP status as `code`; None when nobody answers."""
        with contextlib.suppress(httpx2.HTTPError, ValueError):
            response = self._http.get("/health")
            found = {**response.json(), "code": response.status_code}
            if found["code"] == 200 and self.life.served_s is None:
                self.life.served_s = self.timeline.now_s()
            return found
        return None

    def _keep(self) -> None:
        while not self._leaving.is_set():
            life = self._begin()
            assert life.process.stderr is not None
            for line in life.process.stderr:
                life.said.append((self.timeline.now_s(), line.rstrip()))
            life.process.stderr.close()
            life.process.wait()
            life.ended_s = self.timeline.now_s()
            last = next((line for _, line in reversed(life.said) if line.startswith("Error:")), "")
            self.timeline.note(f"controller {len(self.lives)} ended with {life.process.returncode}: {last}")
            self._judge_end(life, last)
            self._leaving.wait(AGAIN_S)

    def _begin(self) -> Life:
        words = ["serve", "--hostfile", str(self.hostfile), "--port", str(self.port), "-v"]
        with (self.directory / f"controller-{len(self.lives) + 1}.out").open("w") as out:
            process = subprocess.Popen(
                [*_MOECTL, *words, "--max-restarts", str(self.max_restarts)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self._env(),
            )
        self.lives.append(Life(process, self.timeline.now_s()))
        self.timeline.note(f"controller {len(self.lives)} starts as {process.pid}")
        return self.life

    def _judge_end(self, life: Life, last: str) -> None:
        code = life.process.returncode
        if life.killed:
            return
        if life.asked_to_end:
            if code != 130:
                self.problems.append(f"a controller that was told to end ended with exit code {code}: {last}")
        elif code not in (3, 5, 6, 7, 8) or not last:
            self.problems.append(f"a controller ended with exit code {code} and said {last!r}")

    def _env(self) -> dict[str, str]:
        """Return the environment of a user who has only this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOECTL_", "XDG_", "SSH_"))}
        homes = {
            f"XDG_{name}_HOME": str(self.directory / name.lower()) for name in ("CONFIG", "STATE", "DATA", "CACHE")
        }
        own = {"MOECTL_SSH_CONFIG": str(self.cluster.config), "XDG_RUNTIME_DIR": str(self.runtime)}
        clock = {"LD_PRELOAD": _preloads(), "JUMPCLOCK_FILE": str(self.clock), "TMPDIR": str(self.temporary)}
        return {**kept, **homes, **own, **clock}

    # What is there.

    def workers(self) -> list[list[int]]:
        """Return the pids of each host's workers."""
        return [self.workers_on(rank) for rank in range(RANKS)]

    def workers_on(self, rank: int) -> list[int]:
        """Return the pids of one host's workers, oldest first."""
        return sorted(pid for pid, line in self.cluster.processes(rank).items() if "-m moectl worker" in line)

    def connections(self, rank: int) -> list[Connection]:
        """Return the TCP sockets in a host's network."""
        found = []
        for name in ("tcp", "tcp6"):
            rows = Path(f"/proc/{self.cluster.nodes[rank].holder}/net/{name}").read_text().splitlines()[1:]
            for _, local, remote, state, *rest in map(str.split, rows):
                port, peer = (int(end.rpartition(":")[2], 16) for end in (local, remote))
                found.append(Connection(port, peer, state, rest[5]))
        return found

    def listening(self, rank: int) -> list[int]:
        """Return the ports but sshd's on which anything listens on a host."""
        return [c.port for c in self.connections(rank) if c.state == _LISTEN and c.port != 22]

    def find_leftovers(self) -> list[str]:
        """Return what there is and should not be while nobody asks anything: empty when all is well."""
        found = self._find_controllers_leftovers()
        for rank, node in enumerate(self.cluster.nodes):
            found += [f"{node.name}: {text}" for text in self._find_hosts_leftovers(rank, node)]
        return found

    def _find_controllers_leftovers(self) -> list[str]:
        files = _files_left(self.temporary)
        found = [f"the controller has left {files} in its temporary directory"] if files else []
        sockets = [p.name for p in self.runtime.rglob("*.sock")]
        if len(sockets) > 1:
            found.append(f"there are the sockets {sockets} of one controller")
        dead = _zombies(self.life.process.pid)
        return [*found, *([f"the controller has the zombies {dead}"] if dead else [])]

    def _find_hosts_leftovers(self, rank: int, node: Node) -> list[str]:
        processes = self.cluster.processes(rank)
        workers = self.workers_on(rank)
        found = [] if len(workers) == 1 else [f"{len(workers)} workers run: {workers}"]
        strange = {p: c for p, c in processes.items() if p not in workers and "sshd" not in c and "sleep 9d" not in c}
        if strange:
            found.append(f"strange processes run: {strange}")
        if dead := [z for pid in processes for z in _zombies(pid)]:
            found.append(f"zombies: {dead}")
        files = _files_left(node.directory / "tmp")
        if files:
            found.append(f"files are left in its temporary directory: {files}")
        return found + self._find_leaked_ports(rank, workers)

    def _find_leaked_ports(self, rank: int, workers: list[int]) -> list[str]:
        owned = {inode for pid in workers for inode in _socket_inodes(pid)}
        connections = self.connections(rank)
        found = [f"port {port} is still open" for port in self.listening(rank)]
        ring = [c for c in connections if 22 not in (c.port, c.peer_port) and c.state in (_ESTABLISHED, _CLOSE_WAIT)]
        found += [f"a connection of nobody's to port {c.peer_port}" for c in ring if c.inode not in owned]
        theirs = {c.port for c in _own_connections(self.life.process.pid) if c.peer_port == 22}
        logins = [c for c in connections if c.port == 22 and c.state in (_ESTABLISHED, _CLOSE_WAIT)]
        found += [f"an SSH connection from nobody's port {c.peer_port}" for c in logins if c.peer_port not in theirs]
        return found

    def find_nothing_left(self) -> list[str]:
        """Return what still runs on the hosts after the controller has ended: empty when nothing does."""
        found = []
        for rank, node in enumerate(self.cluster.nodes):
            left = [c for c in self.cluster.processes(rank).values() if "sshd" not in c and "sleep 9d" not in c]
            ports = [c.port for c in self.connections(rank) if c.state in (_ESTABLISHED, _LISTEN) and c.port != 22]
            found += [f"{node.name} still runs {left}"] if left else []
            found += [f"{node.name} still has the ports {ports}"] if ports else []
        return found

    def measure(self) -> dict[str, int]:
        """Return what the controller and the workers use: resident bytes, files, threads."""
        pids = {"controller": self.life.process.pid}
        pids |= {f"worker {rank}": workers[0] for rank, workers in enumerate(self.workers()) if workers}
        found = {}
        for name, pid in pids.items():
            with contextlib.suppress(OSError):
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
                found[f"{name} bytes"] = resident
                found[f"{name} files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                found[f"{name} threads"] = len(list(Path(f"/proc/{pid}/task").iterdir()))
        return found

    def tell_evidence(self) -> dict[str, Any]:
        """Return what helps to understand a violation: last words of the controller and the workers' logs."""
        logs = {}
        for node in self.cluster.nodes:
            for path in sorted((node.directory / "chaos" / "logs").glob("*.log")):
                lines = path.read_text(errors="replace").splitlines()
                logs[f"{node.name} {path.name}"] = lines[-12:]
        processes = {node.name: self.cluster.processes(rank) for rank, node in enumerate(self.cluster.nodes)}
        said = {
            f"controller {i + 1}": [f"{s:8.2f} {line}" for s, line in list(life.said)]
            for i, life in list(enumerate(self.lives))[-2:]
        }
        return {"timeline": self.timeline.last(60), "said": said, "logs": logs, "processes": processes}


_MOECTL = (sys.executable, "-m", "moectl")


def _preloads() -> str:
    return " ".join(library for library in map(build_preload, ("norspin", "jumpclock")) if library)


def _files_left(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != "mlx")  # where MLX keeps its kernels


def _zombies(parent: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in (task / "children").read_text().split():
                if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    found.append(int(child))
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    return found


def _own_connections(pid: int) -> list[Connection]:
    owned = _socket_inodes(pid)
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    found = []
    for _, local, remote, state, *rest in map(str.split, rows):
        port, peer = (int(end.rpartition(":")[2], 16) for end in (local, remote))
        if rest[5] in owned:
            found.append(Connection(port, peer, state, rest[5]))
    return found


@contextlib.contextmanager
def run_site(cluster: Cluster, directory: Path, timeline: Timeline, *, max_restarts: int) -> Iterator[Site]:
    """Deploy, start the controller, and end everything with the block."""
    site = Site(cluster, directory, timeline, max_restarts)
    try:
        site.deploy()
        site.start()
        yield site
    finally:
        if site._keeper.is_alive():
            site.stop()
        site._http.close()
        for path in sorted(site.runtime.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        site.runtime.rmdir()
