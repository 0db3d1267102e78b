"""The canary: what fixed prompts come to on one machine, kept in the manifest, so that every start can be compared.

Two prompts go through the model, one shorter and one longer than a chunk of prefill. The short one goes to the experts
that the routers choose; the tokens of the long one are dealt out to all experts in turn, so that each of them is seen,
with the weights that the routers give them. Of every array that a rank adds to
an exchange a few numbers are kept, sums over all its elements with fixed random signs; of the last token the largest
logits. The first exchange at which a rank's numbers are off tells which rank is at fault: up to there it had the same
input as when the set was cut.

It proves that ranks compute here and now what the machine that cut the set computed: that no shard, chip or exchange
changes a number. It does not prove that the model is the one that was trained. The machine that cut the set used the
same code and the same reading of config.json, so a mistake in either is in the reference too, and passes. What guards
against that is `config_keys`, which refuses what is not understood, and the tests against transformers' DBRX.

Only data and their comparison; `model.reference` computes them on one machine, `model.selfcheck` on a rank.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens that are read at a time, here and there: copies of experts share out a chunk's work. So many of DBRX's are
# grouped by expert, and so few that reading the weights costs more than computing with them.
CHUNK = 16
_CHUNK_BEFORE = 512  # in sets whose canary does not say
SHORT = 5
LONG = 1  # the number of the long prompt
TOP = 16  # logits that are kept
WIDTH = 4  # numbers for each exchange

# Of what was to be expected. Sums in another order differ by some 1e-6 in float32; in 16 bits or with quantised
# arithmetic on another device by some percent, and a token whose router is undecided may go to another expert.
TOLERANCE = 1e-3
TOLERANCE_LOW_PRECISION = 0.2
_SMALL = 0.05  # of the usual size: what is smaller is judged by that


@dataclass(frozen=True, slots=True)
class Canary:
    """The reference of one shard set."""

    dtype: str  # of the activations that it was computed with
    points: tuple[tuple[str, ...], ...]  # by rank and prompt: WIDTH float32 numbers for each exchange, in base64
    top: tuple[tuple[tuple[int, float], ...], ...]  # by prompt: tokens and their logits, largest first
    spread: tuple[float, ...]  # by prompt: the standard deviation of all logits
    chunk: int = _CHUNK_BEFORE  # tokens that were read at a time
    deals: bool = False  # whether the long prompt's tokens were dealt out to the experts
    unmet: tuple[tuple[int, int], ...] = ()  # (layer, expert): no token of the prompts, or not of each copy

    def __post_init__(self) -> None:
        if not 0 < self.chunk <= _CHUNK_BEFORE:
            raise ValueError("its canary cannot be read")
        for prompts in self.points:
            for text in prompts:
                decode_points(text)


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """What a rank found.

    `wrong_at` is the first exchange that is off, counted as all ranks count them; one more than the last: the logits.
    """

    worst: float  # deviation, in parts of what was to be expected
    wrong_at: int | None


def make_prompts(vocab_size: int, max_seq_len: int, chunk: int = CHUNK) -> list[list[int]]:
    """Return the prompts as tokens; the same for every model with these sizes, as long as the schema is."""
    lengths = [min(length, max_seq_len) for length in (SHORT, chunk + 9)]
    return [[(7919 * (i + 31 * n) + 13 * i * i) % vocab_size for i in range(n)] for n in lengths]


def cut_chunks(tokens: Sequence[int], chunk: int = CHUNK) -> list[list[int]]:
    """Return a prompt as it is read: chunk by chunk, the last token by itself, as in decode."""
    body = list(tokens[:-1])
    return [*(body[i : i + chunk] for i in range(0, len(body), chunk)), [tokens[-1]]]


def encode_points(points: Sequence[Sequence[float]]) -> str:
    """Return exchanges' numbers as text, in 5 significant digits: what a run on the same machine may differ in."""
    flat = [float(f"{value:.5g}") for point in points for value in point]
    return base64.b64encode(struct.pack(f"<{len(flat)}f", *flat)).decode()


def decode_points(text: str) -> list[tuple[float, ...]]:
    """Return the numbers of each exchange. Raises ValueError."""
    data = base64.b64decode(text, validate=True)
    if len(data) % (4 * WIDTH):
        raise ValueError("its canary cannot be read")
    flat = struct.unpack(f"<{len(data) // 4}f", data)
    return [flat[i : i + WIDTH] for i in range(0, len(flat), WIDTH)]


def describe_unmet(canary: Canary) -> str | None:
    """Return what a person is told of experts that the prompts did not reach; None where they reached all."""
    if not canary.unmet:
        return None
    layers: dict[int, list[str]] = {}
    for layer, expert in canary.unmet:
        layers.setdefault(layer, []).append(str(expert))
    named = [f"layer {layer}: {', '.join(experts)}" for layer, experts in layers.items()]
    more = f", and {len(named) - 3} more layers" if len(named) > 3 else ""
    return f"the canary's prompts do not reach every expert, so it does not check these: {'; '.join(named[:3])}{more}"


def judge(
    expected: Sequence[Sequence[float]],
    found: Sequence[Sequence[float]],
    *,
    tolerance: float,
) -> CanaryVerdict:
    """Compare one rank's exchanges, in their order, with what they should be."""
    sizes = [math.hypot(*point) for point in expected]
    least = _SMALL * sum(sizes) / len(sizes) if sizes else 0.0
    worst, wrong_at = 0.0, None
    if len(found) != len(expected):
        return CanaryVerdict(math.inf, min(len(found), len(expected)))
    for number, (should, is_) in enumerate(zip(expected, found, strict=True)):
        off = math.dist(should, is_) / max(sizes[number], least, 1e-30)
        off = off if math.isfinite(off) else math.inf
        worst = max(worst, off)
        if off > tolerance and wrong_at is None:
            wrong_at = number
    return CanaryVerdict(worst, wrong_at)


def judge_logits(canary: Canary, prompt: int, found: Sequence[float]) -> float:
    """Return how far logits, of the tokens in `canary.top`, are off, in parts of the spread of all."""
    if not all(map(math.isfinite, found)):
        return math.inf
    off = max(abs(value - logit) for (_, logit), value in zip(canary.top[prompt], found, strict=True))
    return off / max(canary.spread[prompt], 1e-30)


def choose_tolerance(canary: Canary, dtype: str) -> float:
    """Return what a deviation may be at most when the activations are of this dtype here."""
    return TOLERANCE if canary.dtype == dtype == "float32" else TOLERANCE_LOW_PRECISION
