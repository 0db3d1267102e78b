"""The worker protocol: every message survives the wire, and garbage is an error of ours."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, strategies as st

from moectl import leash
from moectl.errors import MoectlError, RemoteError, UsageError
from moectl.request import Request, Stats

numbers = st.integers(0, 2**53)
stats = st.builds(Stats, numbers, numbers, st.just(0.25), st.just(1.5), st.just(0.5), numbers)
requests = st.builds(
    Request,
    id=st.integers(1, 10**9),
    prompt=st.text(),
    max_tokens=st.integers(1, 10**6),
    system=st.none() | st.text(),
    raw=st.booleans(),
    temperature=st.floats(0, 10),
    top_p=st.floats(0.01, 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
    prompt_tokens=st.none() | st.lists(numbers).map(tuple),
    ignore_eos=st.booleans(),
)
texts = st.text()
messages = st.one_of(
    st.builds(
        leash.Start, numbers, numbers, texts, st.lists(texts), st.just(30.0), st.none() | texts, st.none() | texts
    ),
    st.builds(leash.Connect, texts, st.dictionaries(texts, texts), st.dictionaries(texts, texts)),
    st.builds(leash.Load),
    st.builds(leash.Generate, requests),
    st.builds(leash.Profile, numbers, st.lists(numbers), numbers),
    st.builds(leash.Cancel, numbers),
    st.builds(leash.Beat),
    st.builds(leash.Gathered, texts),
    st.builds(leash.Listening, st.dictionaries(texts, texts), st.lists(numbers)),
    st.builds(leash.Connecting),
    st.builds(leash.Connected, numbers, numbers),
    st.builds(leash.Loaded),
    st.builds(leash.Ready, texts, st.none() | numbers, numbers, numbers, numbers),
    st.builds(leash.Prefilled, numbers, numbers),
    st.builds(leash.Token, numbers, numbers, texts),
    st.builds(leash.Done, numbers, texts, stats),
    st.builds(
        leash.Profiled,
        id=numbers,
        compute_s=st.just(0.5),
        all_reduce_s=st.just(0.25),
        step_s=st.just(1.5),
        exchanges=numbers,
        peak_memory_bytes=numbers,
        peak_rss_bytes=numbers,
        layers=st.lists(numbers),
        chosen=st.lists(st.lists(numbers)),
        own_experts=st.floats(0, 16),
        busiest_experts=st.floats(0, 16),
    ),
    st.builds(leash.Refused, numbers, texts, st.none() | texts),
    st.builds(leash.Fatal, texts, texts, st.none() | texts, st.none() | numbers),
    st.builds(leash.AllGather, texts),
)


@given(st.lists(messages, max_size=5))
def test_messages_survive_the_wire(sent: list[Any]) -> None:
    stream = io.BytesIO(b"".join(leash.encode(message) for message in sent))
    assert list(leash.read_messages(stream)) == sent


@given(messages)
def test_a_message_is_one_line(message: Any) -> None:
    line = leash.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(line: bytes) -> None:
    try:
        leash.decode(line)
    except MoectlError:
        return
    raise AssertionError(f"{line!r} was taken for a message")


@pytest.mark.parametrize(
    "line",
    [
        b'{"type": "Beat", "more": 1}',
        b'{"type": "Token", "id": 1}',
        b'{"type": "str"}',
        b'{"type": "Generate", "request": {"id": 1}}',
        b"[" * 100_000,
        b"null",
    ],
)
def test_nearly_right_messages_are_refused(line: bytes) -> None:
    with pytest.raises(RemoteError, match="not a message"):
        leash.decode(line)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"prompt": "\udcff"},
        {"prompt": "x" * (5 * 1024 * 1024)},
        {"system": "\udcff"},
    ],
)
def test_requests_check_their_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Request(**{"id": 1, "prompt": "", "max_tokens": 1, **wrong})
