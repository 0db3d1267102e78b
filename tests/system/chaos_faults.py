"""What can go wrong in a cluster, how it is made to, and how it is undone; which of it when is `chaos`'s to choose.

A fault strikes a site with a draw (which host, how long, how hard) and returns what heals it. Each says whether the
workers may survive it: some must be seen as deaths, some must not.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.system.chaos_load import Load
from tests.system.chaos_site import RANKS, Site

Heal = Callable[[], None]
_SIGNALS = (signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGQUIT)
_JUMPS_S = (-86_400, -61, 61, 3_600, 86_400 * 400)
STRAY_S = 20.0  # for a stray process to find a port


@dataclass(frozen=True, slots=True)
class Draw:
    """What chance decided about one strike."""

    rank: int
    other: int  # another rank, next to it in the ring
    hold_s: float  # until it heals
    share: float  # 0 to 1, for whatever the fault has to choose


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that can go wrong."""

    name: str
    strike: Callable[[Site, Load, Draw], Heal]
    hold_s: tuple[float, float]  # from, to
    is_death: bool | None  # the same workers must not (True), must (False), or may (None) live on
    names_host: bool = False  # whoever hears of it has to be told the struck host


def _nothing() -> None:
    pass


def _kill(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _kill_worker(site: Site, load: Load, draw: Draw) -> Heal:
    _kill(site.workers_on(draw.rank), signal.SIGKILL)
    return _nothing


def _signal_worker(site: Site, load: Load, draw: Draw) -> Heal:
    _kill(site.workers_on(draw.rank), _SIGNALS[int(draw.share * len(_SIGNALS))])
    return _nothing


def _freeze_worker(site: Site, load: Load, draw: Draw) -> Heal:
    _kill(site.workers_on(draw.rank), signal.SIGSTOP)
    return _nothing  # it is for moectl to get rid of it


def _pause_worker(site: Site, load: Load, draw: Draw) -> Heal:
    pids = site.workers_on(draw.rank)
    _kill(pids, signal.SIGSTOP)
    return lambda: _kill(pids, signal.SIGCONT)


def _starve_worker(site: Site, load: Load, draw: Draw) -> Heal:
    """Refuse a worker all memory beyond what it has."""
    pids = site.workers_on(draw.rank)

    def limit(pid: int, soft: int) -> None:
        with contextlib.suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))

    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            limit(pid, int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE"))

    def heal() -> None:
        for pid in pids:
            limit(pid, resource.RLIM_INFINITY)

    return heal


def _cut_host(site: Site, load: Load, draw: Draw) -> Heal:
    site.cluster.cut(draw.rank)
    return lambda: site.cluster.heal(draw.rank)


def _unplug_host(site: Site, load: Load, draw: Draw) -> Heal:
    site.cluster.unplug(draw.rank)
    return lambda: site.cluster.plug(draw.rank)


def _reboot_host(site: Site, load: Load, draw: Draw) -> Heal:
    """Take a host's power: nothing of it says goodbye."""
    site.cluster.unplug(draw.rank)
    _kill([pid for pid, line in site.cluster.processes(draw.rank).items() if "sleep 9d" not in line], signal.SIGKILL)

    def heal() -> None:
        site.cluster.plug(draw.rank)
        site.cluster.start_sshd(draw.rank)

    return heal


def _sshds(site: Site, rank: int, *, listener: bool) -> list[int]:
    found = site.cluster.processes(rank).items()
    return [pid for pid, line in found if "sshd" in line and (listener or "[listener]" not in line)]


def _drop_logins(site: Site, load: Load, draw: Draw) -> Heal:
    _kill(_sshds(site, draw.rank, listener=False), signal.SIGKILL)
    return _nothing


def _kill_sshd(site: Site, load: Load, draw: Draw) -> Heal:
    _kill(_sshds(site, draw.rank, listener=True), signal.SIGKILL)
    return lambda: site.cluster.start_sshd(draw.rank)


def _part_ring(site: Site, load: Load, draw: Draw) -> Heal:
    site.cluster.part(draw.rank, draw.other)
    return lambda: site.cluster.join(draw.rank, draw.other)


def _lose_packets(site: Site, load: Load, draw: Draw) -> Heal:
    site.cluster.lose(draw.rank, 0.05 + 0.25 * draw.share)
    return lambda: site.cluster.heal(draw.rank)


def _throttle_host(site: Site, load: Load, draw: Draw) -> Heal:
    site.cluster.throttle(draw.rank, int(50 + 200 * draw.share))
    return lambda: site.cluster.heal(draw.rank)


def _pause_controller(site: Site, load: Load, draw: Draw) -> Heal:
    process = site.life.process
    process.send_signal(signal.SIGSTOP)
    return lambda: process.send_signal(signal.SIGCONT)


def _sleep_all(site: Site, load: Load, draw: Draw) -> Heal:
    """Stop the controller and every worker, as if all lids were closed; they wake at once."""
    pids = [site.life.process.pid, *(pid for workers in site.workers() for pid in workers)]
    _kill(pids, signal.SIGSTOP)
    return lambda: _kill(pids, signal.SIGCONT)


def _kill_controller(site: Site, load: Load, draw: Draw) -> Heal:
    site.life.killed = True
    site.life.process.kill()
    return _nothing


def _start_without_host(site: Site, load: Load, draw: Draw) -> Heal:
    heal = _unplug_host(site, load, draw) if draw.share < 0.5 else _cut_host(site, load, draw)
    _kill_controller(site, load, draw)
    return heal


def _start_without_file(site: Site, load: Load, draw: Draw) -> Heal:
    """Take a shard's file away and make the workers start again."""
    shards = site.cluster.nodes[draw.rank].directory / "chaos" / "shards"
    files = sorted(shards.rglob(f"rank-{draw.rank}/*.safetensors"))
    file = files[int(draw.share * len(files))]
    aside = file.with_suffix(".aside")
    file.rename(aside)
    _kill_worker(site, load, draw)
    return lambda: (aside.rename(file), None)[1]


def _refuse_login(site: Site, load: Load, draw: Draw) -> Heal:
    """Let no host accept the key any more, and make the controller log in again."""
    keys = site.cluster.config.parent / "authorized_keys"
    aside = keys.with_suffix(".aside")
    keys.rename(aside)
    _drop_logins(site, load, draw)
    return lambda: (aside.rename(keys), None)[1]


def _stray(site: Site, load: Load, draw: Draw) -> Heal:
    """Connect to every port that opens on any host while the workers start again, and talk nonsense there."""
    over = threading.Event()

    def connect() -> None:
        met: set[tuple[int, int]] = set()
        with contextlib.ExitStack() as held:
            while not over.wait(0.01):
                for rank, port in [(r, p) for r in range(RANKS) for p in site.listening(r) if (r, p) not in met]:
                    met.add((rank, port))
                    with contextlib.suppress(OSError):
                        address = site.cluster.nodes[rank].address
                        stranger = held.enter_context(socket.create_connection((address, port), 1.0))
                        site.timeline.note(f"a stranger is connected to node{rank}:{port}")
                        stranger.sendall(bytes(64) if draw.share < 0.5 else os.urandom(64))

    thread = threading.Thread(target=connect, name="stray", daemon=True)
    thread.start()
    _kill_worker(site, load, draw)

    def heal() -> None:
        over.set()
        thread.join()

    return heal


def _jump_clock(site: Site, load: Load, draw: Draw) -> Heal:
    """Set the time of day, on a host or where the controller is."""
    files = [site.clock, *(node.directory / "clock" for node in site.cluster.nodes)]
    file = files[int(draw.share * len(files))]

    def put(seconds: int) -> None:
        with file.open("r+b") as f:  # in place: the processes have it mapped
            f.write(seconds.to_bytes(8, "little", signed=True))

    put(_JUMPS_S[(draw.rank + 4 * draw.other) % len(_JUMPS_S)])
    return lambda: put(0)


def _leave(site: Site, load: Load, draw: Draw) -> Heal:
    load.leave(1 + round(draw.share))
    return lambda: load.leave(0)


_AT_ONCE = (0.0, 0.0)
FAULTS = (
    Fault("worker killed", _kill_worker, _AT_ONCE, True, names_host=True),
    Fault("worker raises", _signal_worker, _AT_ONCE, True, names_host=True),
    Fault("worker frozen", _freeze_worker, _AT_ONCE, True, names_host=True),
    Fault("worker paused", _pause_worker, (1.0, 2.0), False),
    Fault("worker starved of memory", _starve_worker, (3.0, 6.0), None),
    Fault("host cut off", _cut_host, (8.0, 14.0), True, names_host=True),
    Fault("host unplugged", _unplug_host, (8.0, 14.0), True, names_host=True),
    Fault("host rebooted", _reboot_host, (3.0, 10.0), True, names_host=True),
    Fault("SSH connections killed", _drop_logins, _AT_ONCE, True, names_host=True),
    Fault("sshd killed", _kill_sshd, (1.0, 6.0), True, names_host=True),
    Fault("ring parted", _part_ring, (10.0, 20.0), None),
    Fault("packets lost", _lose_packets, (2.0, 6.0), None),
    Fault("host throttled", _throttle_host, (2.0, 6.0), None),
    Fault("controller paused", _pause_controller, (0.5, 1.2), False),
    Fault("controller frozen", _pause_controller, (5.0, 5.5), None),
    Fault("all asleep", _sleep_all, (4.0, 7.0), None),
    Fault("controller killed", _kill_controller, _AT_ONCE, True),
    Fault("start without a host", _start_without_host, (3.0, 12.0), True),
    Fault("start without a file", _start_without_file, (10.0, 15.0), True),
    Fault("login refused", _refuse_login, (2.0, 5.0), True),
    Fault("stray connections", _stray, (STRAY_S, STRAY_S), True),
    Fault("clock set", _jump_clock, (2.0, 5.0), False),
    Fault("client leaves", _leave, (1.0, 3.0), False),
)


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault at its time within an act."""

    fault: Fault
    draw: Draw
    after_s: float  # since the act began


def draw_acts(seed: int, faults: Sequence[Fault] = FAULTS) -> Iterator[tuple[Strike, ...]]:
    """Yield for ever what to do next, the same for the same seed: mostly one fault, sometimes two or three at once.

    Faults are drawn like cards: none comes again before all others have come.
    """
    chance = random.Random(seed)
    deck: list[Fault] = []
    while True:
        count = chance.choices((1, 2, 3), (75, 20, 5))[0]
        while len(deck) < count:
            more = list(faults)
            chance.shuffle(more)
            deck = [*more, *deck]
        act = []
        for number in range(count):
            fault = deck.pop()
            rank = chance.randrange(RANKS)
            other = (rank + chance.choice((1, RANKS - 1))) % RANKS
            hold_s = round(chance.uniform(*fault.hold_s), 2)
            draw = Draw(rank, other, hold_s, round(chance.random(), 3))
            act.append(Strike(fault, draw, round(number and chance.uniform(0.0, 4.0), 2)))
        yield tuple(act)


def wait_until(when_s: float) -> None:
    """Sleep until a moment of the monotonic clock."""
    time.sleep(max(0.0, when_s - time.monotonic()))
