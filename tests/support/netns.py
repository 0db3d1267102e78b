"""Four hosts on one machine: network namespaces, each with an address, a hostname, /node and an sshd.

A bridge joins them, so that a host can be cut off or slowed down as a cable would. Needs root, iproute2 and
util-linux; iptables for `cut`. Names carry the process id, so that two test runs do not meet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moectl.hosts.hostfile import Host
from tests.support.sshd import SSHD, known_host, make_key, server_config, wait_for_banner


@dataclass(frozen=True)
class Node:
    """One namespaced host; `name` is its alias in the cluster's ssh configuration."""

    name: str
    namespace: str
    link: str  # the bridge's end of its cable
    address: str
    directory: Path  # what the host sees as /node
    holder: int  # process that keeps the mount and UTS namespaces alive


@dataclass(frozen=True)
class Cluster:
    """Running hosts node0 … nodeN-1, reached with `config` as the ssh configuration."""

    nodes: tuple[Node, ...]
    config: Path
    key: Path
    gateway: str  # the operator's address on the bridge
    bridge: str  # what only the operator's own packets leave by: those between nodes pass beside it

    def hosts(self, *, python: str = sys.executable, dir: str = "/node/moectl") -> tuple[Host, ...]:
        """Return the nodes as one would write them in hosts.txt."""
        return tuple(Host(n.name, ips=(n.address,), python=python, dir=dir) for n in self.nodes)

    def run(self, rank: int, argv: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside a node, without SSH."""
        inside = ["nsenter", "--target", str(self.nodes[rank].holder), "--net", "--mount", "--uts", "--"]
        return subprocess.run([*inside, *argv], capture_output=True, text=True, check=check)

    def processes(self, rank: int) -> dict[int, str]:
        """Return pid → command line of all that runs in a node's network, the sshd included."""
        listed = _ip("netns", "pids", self.nodes[rank].namespace)
        found = {}
        for pid in map(int, listed.split()):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        return found

    def cut(self, rank: int) -> None:
        """Drop every packet of a node, silently."""
        self.run(rank, ["iptables", "-I", "INPUT", "-i", "eth0", "-j", "DROP"])
        self.run(rank, ["iptables", "-I", "OUTPUT", "-o", "eth0", "-j", "DROP"])

    def deafen(self, rank: int, other: int, *how: str) -> None:
        """Drop every packet from another node, silently, or do with it what iptables is told here."""
        self.run(rank, ["iptables", "-I", "INPUT", "-s", self.nodes[other].address, *(how or ("-j", "DROP"))])

    def limit_uplink(self, rate: str) -> None:
        """Limit what the operator sends to all nodes together, such as "80mbit"; until `mend`."""
        words = ["tc", "qdisc", "replace", "dev", self.bridge, "root", "tbf", "rate", rate]
        subprocess.run([*words, "burst", "256kb", "latency", "100ms"], check=True)

    @property
    def sent_bytes(self) -> int:
        """What the operator has sent to the nodes so far, headers included."""
        return int(Path(f"/sys/class/net/{self.bridge}/statistics/tx_bytes").read_text())

    def heal(self, rank: int) -> None:
        """Undo whatever iptables does to a node."""
        self.run(rank, ["iptables", "-F"], check=False)

    def unplug(self, rank: int) -> None:
        """Take the cable out: the carrier is lost."""
        _ip("link", "set", self.nodes[rank].link, "down")

    def plug(self, rank: int) -> None:
        """Put the cable back."""
        _ip("link", "set", self.nodes[rank].link, "up")

    def part(self, rank: int, other: int) -> None:
        """Drop every packet between two nodes, silently; both still hear all others."""
        for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
            self.run(rank, ["iptables", "-I", chain, side, self.nodes[other].address, "-j", "DROP"])

    def join(self, rank: int, other: int) -> None:
        """Undo `part`."""
        for chain, side in (("INPUT", "-s"), ("OUTPUT", "-d")):
            self.run(rank, ["iptables", "-D", chain, side, self.nodes[other].address, "-j", "DROP"], check=False)

    def lose(self, rank: int, share: float) -> None:
        """Drop this share of what a node is sent, at random; `heal` undoes it."""
        often = ["-m", "statistic", "--mode", "random", "--probability", f"{share:.3f}"]
        self.run(rank, ["iptables", "-I", "INPUT", "-i", "eth0", *often, "-j", "DROP"])

    def throttle(self, rank: int, per_second: int) -> None:
        """Let a node hear no more than so many packets per second, beyond bursts; `heal` undoes it."""
        within = ["-m", "limit", "--limit", f"{per_second}/second", "--limit-burst", "30"]
        self.run(rank, ["iptables", "-I", "INPUT", "-i", "eth0", "-j", "DROP"])
        self.run(rank, ["iptables", "-I", "INPUT", "-i", "eth0", *within, "-j", "ACCEPT"])

    def start_sshd(self, rank: int) -> None:
        """Start a node's sshd again after its processes were killed."""
        _start_sshd(self.nodes[rank])

    def mend(self) -> None:
        """Undo every cut, unplug and limit."""
        subprocess.run(["tc", "qdisc", "del", "dev", self.bridge, "root"], capture_output=True, check=False)
        for rank in range(len(self.nodes)):
            self.heal(rank)
            self.plug(rank)


@contextlib.contextmanager
def run_cluster(directory: Path, count: int) -> Iterator[Cluster]:
    """Run `count` hosts until the block ends."""
    tag = f"{os.getpid() % 46656:x}"
    third = os.getpid() % 250 + 2
    bridge, gateway = f"moe{tag}b", f"10.77.{third}.1"
    key = make_key(directory / "id_test")
    (directory / "authorized_keys").write_text(Path(f"{key}.pub").read_text())
    Path("/run/sshd").mkdir(parents=True, exist_ok=True)
    Path("/node").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{gateway}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        nodes = tuple(
            _start_node(stack, directory, bridge, f"moe{tag}{i}", f"10.77.{third}.{10 + i}", f"node{i}")
            for i in range(count)
        )
        for node in nodes:
            wait_for_banner(node.address, 22)
        config = directory / "ssh_config"
        config.write_text("".join(_client_config(n, key, directory / "known_hosts") for n in nodes))
        yield Cluster(nodes, config, key, gateway, bridge)


def _start_node(
    stack: contextlib.ExitStack, directory: Path, bridge: str, namespace: str, address: str, name: str
) -> Node:
    own = directory / name
    own.mkdir()
    link = f"{namespace}v"
    _ip("netns", "add", namespace)
    stack.callback(_ip, "netns", "del", namespace)
    stack.callback(_end_processes, namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", link, "master", bridge, "up")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _ip("-n", namespace, "link", "set", device, "up")
    _ip("-n", namespace, "route", "add", "default", "via", f"{address.rpartition('.')[0]}.1")
    host_key = make_key(directory / f"{name}.host_key")
    with (directory / "known_hosts").open("a") as f:
        f.write(known_host(address, 22, host_key))
    config = directory / f"{name}.sshd_config"
    config.write_text(server_config(own, address, 22, host_key, directory / "authorized_keys"))
    holder = _start_holder(stack, namespace, own, name)
    node = Node(name, namespace, link, address, own, holder)
    _start_sshd(node)
    return node


def _start_sshd(node: Node) -> None:
    base = node.directory.parent / node.name
    inside = ["nsenter", "--target", str(node.holder), "--net", "--mount", "--uts", "--"]
    subprocess.run([*inside, str(SSHD), "-f", f"{base}.sshd_config", "-E", f"{base}.log"], check=True)


def _start_holder(stack: contextlib.ExitStack, namespace: str, own: Path, name: str) -> int:
    """Start the process that holds a node's mounts and hostname; return once both are set."""
    script = 'mount --make-rprivate / && mount --bind "$1" /node && hostname "$2" && echo ready; exec sleep 9d'
    child = subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            namespace,
            "unshare",
            "--mount",
            "--uts",
            "--",
            "sh",
            "-c",
            script,
            "sh",
            own,
            name,
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    stack.callback(child.wait)
    stack.callback(child.stdout.close)
    stack.callback(child.kill)
    assert child.stdout.readline() == "ready\n", f"{name} did not start"
    return child.pid


def _end_processes(namespace: str) -> None:
    end = time.monotonic() + 10
    while (pids := _ip("netns", "pids", namespace).split()) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)


def _client_config(node: Node, key: Path, known_hosts: Path) -> str:
    return f"""Host {node.name}
  HostName {node.address}
  User root
  IdentityFile {key}
  IdentitiesOnly yes
  IdentityAgent none
  UserKnownHostsFile {known_hosts}
  GlobalKnownHostsFile none
  ConnectTimeout 5
"""


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
