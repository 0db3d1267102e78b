"""Who takes the shared files of a shard set from whom: a chain of hosts, each passing on what it has.

The first takes them from the operator's machine, every other from a host before it, so nobody waits for himself. It
decides and nothing else: connections and bytes are `relay`'s, processes `fleet`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HOLD_S = 10.0  # how long a host waits for one that has more already
HEAD = -1  # the place of those that lack nothing
MAX_TRIES = 2  # hosts that fail one host before it takes from the operator's machine


@dataclass(slots=True)
class _Member:
    lacks_bytes: int  # of shared files
    joined: bool = False
    late: bool = False  # busy with something else; nobody waits for it
    place: int | None = None  # in the chain; whole ones stand at its head
    takers: int = 0
    wants_since: float | None = None
    failed: set[int] = field(default_factory=set)
    source: int | None = None


class Chain:
    """The hosts of one deployment, by rank."""

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._places = 0

    def expect(self, rank: int, lacks_bytes: int, *, whole: bool = False) -> None:
        """Add a host; a `whole` one has nothing to do, and will join when it is chosen."""
        self._members[rank] = _Member(lacks_bytes, joined=whole, place=HEAD if whole else None)

    def delay(self, rank: int) -> None:
        """Note that a host will be busy for a while before it joins."""
        if rank in self._members:
            self._members[rank].late = True

    def join(self, rank: int) -> None:
        """Note that a host can pass files on as soon as it has them."""
        member = self._members[rank]
        member.joined = True
        if not member.lacks_bytes:
            member.place = HEAD

    def want(self, rank: int, now_s: float, failed: int | None = None) -> None:
        """Note that a host asks for a source; the one it had, if any, does not do."""
        member = self._members[rank]
        member.wants_since = now_s
        if failed is not None:
            member.failed.add(failed)
            self._leave_source(member)

    def drop(self, rank: int) -> None:
        """Forget a host that has failed."""
        member = self._members.pop(rank, None)
        if member is not None:
            self._leave_source(member)

    def finish(self, rank: int) -> None:
        """Note that a host has all; it goes on passing files on."""
        if rank in self._members:
            self._leave_source(self._members[rank])

    @property
    def is_waiting(self) -> bool:
        """Whether a host waits to be told its source."""
        return any(m.wants_since is not None for m in self._members.values())

    def decide(self, now_s: float) -> list[tuple[int, int | None]]:
        """Return (rank, its source) for every host whose turn has come; None is the operator's machine."""
        decided: list[tuple[int, int | None]] = []
        asking = sorted((m.lacks_bytes, rank) for rank, m in self._members.items() if m.wants_since is not None)
        for _, rank in asking:
            member = self._members[rank]
            if self._should_wait(rank, now_s):
                continue
            member.wants_since = None
            member.source = self._choose(rank)
            if member.source is not None:
                self._members[member.source].takers += 1
            if member.place is None:
                member.place, self._places = self._places, self._places + 1
            decided.append((rank, member.source))
        return decided

    def _should_wait(self, rank: int, now_s: float) -> bool:
        """Whether a host that has more of the files, or a lower rank, is about to join."""
        member = self._members[rank]
        if member.wants_since is None or now_s - member.wants_since >= HOLD_S:
            return False
        mine = (member.lacks_bytes, rank)
        return any((m.lacks_bytes, r) < mine and m.place is None and not m.late for r, m in self._members.items())

    def _choose(self, rank: int) -> int | None:
        member = self._members[rank]
        if len(member.failed) >= MAX_TRIES:
            return None
        place = self._places if member.place is None else member.place
        able = [
            (m.takers, m.place != HEAD, -m.place, r)
            for r, m in self._members.items()
            if r != rank and m.joined and m.place is not None and m.place < place and r not in member.failed
        ]
        return min(able)[-1] if able else None

    def _leave_source(self, member: _Member) -> None:
        if member.source in self._members:
            self._members[member.source].takers -= 1
        member.source = None
