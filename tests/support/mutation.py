"""Fuzzing: valid inputs, edited by Hypothesis or flipped at random, for a reader that may only refuse in one line.

Each target runs a bounded number of examples; with `--fuzz-seconds N` it goes on for so long, with new seeds.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st

from moectl.errors import MoectlError
from tests.support.tiny import json_values

HANG_S = 20  # no reader of these small inputs may take so long
MOST_MEMORY_BYTES = 400 << 20  # that a target may add to the process
EXAMPLES = 60
FLIPS = 200
ROUND = 2000  # examples between two looks at the clock
# What parsers trip over: quotes, nesting, ends of things, numbers at their edges, names that lead elsewhere.
TOKENS = [
    *(b"", b"\0", b"\n", b"\r\n", b" ", b"\t", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"=", b"#", b"@"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"-1", b"0", b"1e400", b"4294967296", b"9" * 30, b"9" * 5000, b"0.5"),
    *(b"..", b"../../x", b"/etc/passwd", b"$(id)", b"`id`", b"-rf", b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800"),
    *(b"[" * 3000, b'{"a":' * 3000, b"\\u0000", "\N{SNOWMAN}".encode(), b"\x1b[2J"),
]

edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


def edit(data: bytes, changes: Sequence[tuple[float, int, bytes]]) -> bytes:
    """Return data with pieces replaced: each change is (where, how many bytes go, what comes instead)."""
    for where, length, text in changes:
        at = int(where * len(data))
        data = data[:at] + text + data[at + length :]
    return data


@st.composite
def documents(draw: st.DrawFn, valid: Any) -> bytes:
    """Draw a JSON document with one to three of its values replaced, missing or doubled."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        value = _change(draw, value)
    return json.dumps(value).encode()


def _change(draw: st.DrawFn, value: Any) -> Any:
    if not value or not isinstance(value, dict | list) or draw(st.integers(0, 5)) == 0:
        return draw(json_values | st.integers(-(2**70), 2**70) | st.sampled_from(TOKENS).map(repr))
    if isinstance(value, list):
        at = draw(st.integers(0, len(value) - 1))
        kept = draw(st.sampled_from([[], [value[at], value[at]], None]))
        return [*value[:at], *([_change(draw, value[at])] if kept is None else kept), *value[at + 1 :]]
    key = draw(st.sampled_from(sorted(value)))
    match draw(st.integers(0, 4)):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {**value, draw(st.text(max_size=6)): value[key]}
    return {**value, key: _change(draw, value[key])}


def flip(data: bytes, dice: random.Random) -> bytes:
    """Return data with some bits flipped, bytes overwritten, and parts cut, doubled or moved."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 6)):
        at = dice.randrange(len(changed) + 1)
        length = dice.choice((1, 2, 8, 64))
        match dice.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << dice.randrange(8)
            case 1 if at < len(changed):
                changed[at] = dice.randrange(256)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                other = dice.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + length]
            case _:
                changed[at:at] = dice.choice(TOKENS)
    return bytes(changed)


def refuse_or_accept(read: Callable[[bytes], object], data: bytes) -> bool:
    """Give data to a reader; return whether it was accepted. Whatever is raised has to be ours, and one line."""
    refusal = None
    try:
        with _no_hang(data):
            read(data)
    except MoectlError as error:
        refusal = error.message
    assert refusal != "", "an error without a word"
    assert "\n" not in (refusal or ""), f"more than one line: {refusal!r}"
    return refusal is None


@contextlib.contextmanager
def _no_hang(data: bytes) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise AssertionError(f"nothing came of {data[:200]!r} within {HANG_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, valid: Sequence[bytes], read: Callable[[bytes], object], *, seconds: float = 0.0) -> None:
    """Fuzz a reader with edits of valid inputs; at least one of those has to be accepted as it is.

    `seconds` 0 is the short run, the same each time; longer ones have new seeds and tell what they did.
    """
    assert all(refuse_or_accept(read, data) for data in valid), "a valid input is refused"
    memory = _peak_bytes()
    counts = [0, 0]

    def check(data: bytes) -> None:
        counts[refuse_or_accept(read, data)] += 1

    whole = st.sampled_from(valid)
    inputs = st.builds(edit, whole, edits)
    parsed = [json.loads(data) for data in valid if _is_json(data)]
    if parsed:
        inputs |= st.sampled_from(parsed).flatmap(documents)
    end = time.monotonic() + seconds
    start = int.from_bytes(os.urandom(4), "little") if seconds else 0
    turn = 0
    while turn == 0 or time.monotonic() < end:
        _run_hypothesis(inputs, check, start + turn, ROUND if seconds else EXAMPLES)
        dice = random.Random(start + turn)
        for _ in range(ROUND if seconds else FLIPS):
            data = flip(dice.choice(valid), dice)
            try:
                check(data)
            except Exception as error:
                raise AssertionError(f"{name}: {data!r}") from error
        turn += 1
    grown = _peak_bytes() - memory
    assert grown < MOST_MEMORY_BYTES, f"{grown} bytes more than before"
    if seconds:
        told = f"{sum(counts)} inputs, {counts[1]} accepted, seed {start}, {grown >> 20} MiB more"
        sys.stderr.write(f"\nfuzz {name}: {told}\n")


def _run_hypothesis(inputs: st.SearchStrategy[bytes], check: Callable[[bytes], None], start: int, count: int) -> None:
    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(data: bytes) -> None:
        check(data)

    run()


def _is_json(data: bytes) -> bool:
    with contextlib.suppress(ValueError):
        json.loads(data)
        return True
    return False


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
