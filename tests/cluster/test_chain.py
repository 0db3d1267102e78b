"""Who takes shared files from whom: nobody waits for himself, everybody is told, and most often a chain comes out."""

from __future__ import annotations

from hypothesis import given, strategies as st

from moectl.cluster.deploy.relay import HOLD_S, MAX_TRIES, Chain


def joined(chain: Chain, *ranks: int, now_s: float = 0.0) -> None:
    for rank in ranks:
        chain.join(rank)
        chain.want(rank, now_s)


def test_empty_hosts_make_a_chain_in_rank_order_however_they_come() -> None:
    chain = Chain()
    for rank in range(4):
        chain.expect(rank, 100)
    joined(chain, 3, 1)
    assert chain.decide(0.0) == []  # rank 0 is about to join
    assert chain.is_waiting
    joined(chain, 2, 0)
    assert chain.decide(0.0) == [(0, None), (1, 0), (2, 1), (3, 2)]
    assert not chain.is_waiting


def test_who_has_more_comes_first() -> None:
    chain = Chain()
    for rank, lacks in enumerate((100, 40, 70)):
        chain.expect(rank, lacks)
    joined(chain, 0, 1, 2)
    assert chain.decide(0.0) == [(1, None), (2, 1), (0, 2)]


def test_whole_hosts_share_the_work_and_the_operators_machine_has_none() -> None:
    chain = Chain()
    chain.expect(0, 0, whole=True)
    chain.expect(1, 0, whole=True)
    for rank in (2, 3, 4):
        chain.expect(rank, 100)
    joined(chain, 2, 3, 4)
    assert chain.decide(0.0) == [(2, 0), (3, 1), (4, 3)]


def test_nobody_waits_long_nor_for_one_that_installs() -> None:
    chain = Chain()
    for rank in range(3):
        chain.expect(rank, 100)
    joined(chain, 2)
    assert chain.decide(HOLD_S / 2) == []
    assert chain.decide(HOLD_S) == [(2, None)]
    chain.delay(0)
    joined(chain, 1, now_s=10.0)
    assert chain.decide(10.0) == [(1, 2)]
    joined(chain, 0, now_s=20.0)
    assert chain.decide(20.0) == [(0, 1)]


def test_a_source_that_fails_is_replaced_and_in_the_end_by_the_operators_machine() -> None:
    chain = Chain()
    for rank in range(4):
        chain.expect(rank, 100)
    joined(chain, 0, 1, 2, 3)
    assert dict(chain.decide(0.0))[3] == 2
    failed = 2
    for _ in range(MAX_TRIES):
        chain.want(3, 1.0, failed)
        ((rank, source),) = chain.decide(1.0)
        assert rank == 3
        failed = source if source is not None else -1
    assert source is None


def test_a_host_that_is_gone_is_nobodys_source() -> None:
    chain = Chain()
    for rank in range(3):
        chain.expect(rank, 100)
    joined(chain, 0, 1, 2)
    assert chain.decide(0.0) == [(0, None), (1, 0), (2, 1)]
    chain.drop(0)
    chain.want(1, 1.0, 0)
    assert chain.decide(1.0) == [(1, None)]  # not 2, which waits for 1
    chain.finish(1)
    chain.drop(1)
    chain.want(2, 2.0, 1)
    assert chain.decide(2.0) == [(2, None)]


def assert_no_circle(sources: dict[int, int]) -> None:
    for start in sources:
        seen, place = {start}, sources.get(start)
        while place is not None:
            assert place not in seen, f"{start} waits for itself"
            seen.add(place)
            place = sources.get(place)


steps = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["join", "want", "drop", "delay"])), max_size=60)


@given(steps, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_no_circle_ever_and_everybody_is_answered(steps: list[tuple[int, str]], lacks: list[int]) -> None:
    """Whatever joins, asks, fails and leaves in whatever order."""
    chain = Chain()
    for rank, lack in enumerate(lacks):
        chain.expect(rank, lack, whole=lack == 0 and rank % 2 == 0)
    able = {r for r in range(6) if lacks[r] == 0 and r % 2 == 0}
    gone: set[int] = set()
    sources: dict[int, int] = {}
    for now, (rank, step) in enumerate(steps):
        if rank in gone or (step == "want" and (rank not in able or not lacks[rank])):
            continue
        if step == "want":
            chain.want(rank, float(now), sources.pop(rank, None))
        else:
            {"join": chain.join, "drop": chain.drop, "delay": chain.delay}[step](rank)
        if step == "join":
            able.add(rank)
        if step == "drop":
            gone.add(rank)
            able.discard(rank)
        for taker, source in chain.decide(float(now)):
            sources.pop(taker, None)
            if source is not None:
                assert source in able
                sources[taker] = source
        assert_no_circle(sources)
    chain.decide(1e9)
    assert not chain.is_waiting
