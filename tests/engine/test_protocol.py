"""The worker protocol: every message survives the wire, and garbage is an error of ours."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from moectl.engine import protocol
from moectl.engine.request import Request, Stats
from moectl.errors import MoectlError, RemoteError, UsageError

numbers = st.integers(0, 2**53)
stats = st.builds(Stats, numbers, numbers, st.just(0.25), st.just(1.5), st.just(0.5), numbers)
requests = st.builds(
    Request,
    id=st.integers(1, 10**9),
    prompt=st.text(),
    max_tokens=st.integers(1, 10**6),
    messages=st.none() | st.lists(st.dictionaries(st.text(), st.text())).map(tuple),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
    prompt_tokens=st.none() | st.lists(numbers).map(tuple),
    ignore_eos=st.booleans(),
)
texts = st.text()
failures = st.fixed_dictionaries({"kind": texts, "message": texts, "hint": st.none() | texts})
messages = st.one_of(
    st.builds(
        protocol.Start,
        numbers,
        numbers,
        texts,
        st.lists(texts),
        st.just(30.0),
        log=st.none() | texts,
        run=st.builds(protocol.RunOptions, dtype=st.none() | texts),
    ),
    st.builds(protocol.Connect, texts, st.dictionaries(texts, texts), st.dictionaries(texts, texts)),
    st.builds(protocol.Load),
    st.builds(protocol.Check),
    st.builds(protocol.Generate, requests),
    st.builds(protocol.Profile, numbers, st.lists(numbers), numbers),
    st.builds(protocol.Cancel, numbers),
    st.builds(protocol.Beat),
    st.builds(protocol.Gathered, texts),
    st.builds(protocol.Listening, st.dictionaries(texts, texts), st.lists(numbers)),
    st.builds(protocol.Connecting),
    st.builds(protocol.Connected, numbers, numbers),
    st.builds(protocol.Loaded),
    st.builds(protocol.Ready, texts, st.none() | numbers, numbers, numbers, numbers),
    st.builds(protocol.Prefilled, numbers, numbers),
    st.builds(protocol.Token, numbers, numbers, texts),
    st.builds(protocol.Done, numbers, texts, stats, texts),
    st.builds(
        protocol.Profiled,
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
    st.builds(protocol.Refused, numbers, failures, st.none() | texts, st.none() | texts),
    st.builds(protocol.Fatal, failures, st.none() | numbers),
    st.builds(protocol.AllGather, texts),
)


@settings(deadline=None)  # each kind's checks are made at its first use
@given(st.lists(messages, max_size=5))
def test_messages_survive_the_wire(sent: list[Any]) -> None:
    stream = io.BytesIO(b"".join(protocol.encode(message) for message in sent))
    assert list(protocol.read_messages(stream)) == sent


@given(messages)
def test_a_message_is_one_line(message: Any) -> None:
    line = protocol.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(line: bytes) -> None:
    try:
        protocol.decode(line)
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
        protocol.decode(line)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": -0.1},
        {"top_p": 1.5},
        {"seed": -1},
        {"prompt": "\udcff"},
        {"prompt": "x" * (5 * 1024 * 1024)},
        {"messages": ({"role": "system", "content": "\udcff"},)},
    ],
)
def test_requests_check_their_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Request(**{"id": 1, "prompt": "", "max_tokens": 1, **wrong})
