"""The canary: the results of fixed prompts on one machine, kept in the manifest and compared at every start.

Two prompts go through the model, one shorter and one longer than a chunk of prefill. The short one goes to the experts
that the routers choose. The tokens of the long one go to all experts in turn, so that each expert is used, with equal
weights, whose sum is the routers'. Of every array that a rank adds to an exchange it keeps a few numbers: sums over all
elements with fixed random signs; of the last token it keeps the largest logits. The first exchange with wrong numbers
names the rank at fault: up to there it had the same input as when the set was cut.

The reference is mlx-lm's undivided model, computed from the files of all ranks when the set was cut. So it proves that
the ranks together compute that model: no division, shard, chip or exchange changes a number. It does not prove that the
model is the one that was trained: a mistake in mlx-lm, or in how its files were read, is in the reference too. The
tests against transformers guard against that.

Only data and their comparison; `engine.network.canary_run` computes them.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens that ranks read at a time: copies of experts divide the work of a chunk. It is large enough that tokens are
# grouped by expert, and small enough that reading the weights takes longer than computing.
CHUNK = 16
_MOST = 512  # tokens in a chunk
SHORT = 5
LONG = 1  # the number of the long prompt
TOP = 16  # logits that are kept
WIDTH = 4  # numbers for each exchange

# Parts of the expected value. Sums in another order differ by some 1e-6 in float32. In 16 bits, or with quantised
# arithmetic on another device, they differ by some percent, and a token may go to another expert where two are close.
TOLERANCE = 1e-3
TOLERANCE_LOW_PRECISION = 0.2
TOLERANCE_OF_CHOICE = 1.0  # of the prompt that goes to the chosen experts, at low precision
_SMALL = 0.2  # of the mean size: smaller values are compared with that


class NoReference(Exception):
    """A model for which no canary can be computed; says why."""


@dataclass(frozen=True, slots=True)
class Canary:
    """The reference of one shard set."""

    dtype: str  # of the activations
    # By rank and prompt: for each exchange WIDTH float32 numbers and the size that such have, in base64.
    points: tuple[tuple[str, ...], ...]
    top: tuple[tuple[tuple[int, float], ...], ...]  # by prompt: tokens and their logits, largest first
    spread: tuple[float, ...]  # by prompt: the standard deviation of all logits
    chunk: int = CHUNK  # tokens that are read at a time
    unmet: tuple[tuple[int, int], ...] = ()  # (layer, expert) that no token reached, or not in each copy

    def __post_init__(self) -> None:
        if not 0 < self.chunk <= _MOST:
            raise ValueError("its canary cannot be read")
        for prompts in self.points:
            for text in prompts:
                decode_points(text)


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """The result of a rank's comparison.

    `wrong_at` is the number of the first wrong exchange, the same on all ranks; one more than the last is the logits.
    """

    worst: float  # the largest deviation, in parts of the expected value
    wrong_at: int | None


def make_prompts(vocab_size: int, max_seq_len: int, chunk: int = CHUNK) -> list[list[int]]:
    """Return the prompts as tokens, the same for every model with these sizes and every shard set of this schema."""
    lengths = [min(length, max_seq_len) for length in (SHORT, chunk + 9)]
    return [[(7919 * (i + 31 * n) + 13 * i * i) % vocab_size for i in range(n)] for n in lengths]


def cut_chunks(tokens: Sequence[int], chunk: int = CHUNK) -> list[list[int]]:
    """Return a prompt in the chunks in which it is read; the last token is alone, as in decode."""
    body = list(tokens[:-1])
    return [*(body[i : i + chunk] for i in range(0, len(body), chunk)), [tokens[-1]]]


def encode_points(points: Sequence[Sequence[float]]) -> str:
    """Return exchanges' numbers as text, with 5 significant digits: two runs on one machine may differ beyond these."""
    flat = [float(f"{value:.5g}") for point in points for value in point]
    return base64.b64encode(struct.pack(f"<{len(flat)}f", *flat)).decode()


def decode_points(text: str) -> list[tuple[float, ...]]:
    """Return the numbers of each exchange, and their size. Raises ValueError."""
    data = base64.b64decode(text, validate=True)
    if len(data) % (4 * (WIDTH + 1)):
        raise ValueError("its canary cannot be read")
    flat = struct.unpack(f"<{len(data) // 4}f", data)
    return [flat[i : i + WIDTH + 1] for i in range(0, len(flat), WIDTH + 1)]


def describe_unmet(canary: Canary) -> str | None:
    """Return a sentence about the experts that the prompts do not reach; None where they reach all."""
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
    """Compare one rank's exchanges, in their order, with the expected ones, which know the size of their numbers.

    It is that of the array: where its elements happen to cancel out, its numbers are small, and their errors are not.
    """
    sizes = [point[WIDTH] for point in expected]
    least = _SMALL * sum(sizes) / len(sizes) if sizes else 0.0
    worst, wrong_at = 0.0, None
    if len(found) != len(expected):
        return CanaryVerdict(math.inf, min(len(found), len(expected)))
    for number, (should, is_) in enumerate(zip(expected, found, strict=True)):
        off = math.dist(should[:WIDTH], is_[:WIDTH]) / max(sizes[number], least, 1e-30)
        off = off if math.isfinite(off) else math.inf
        worst = max(worst, off)
        if off > tolerance and wrong_at is None:
            wrong_at = number
    return CanaryVerdict(worst, wrong_at)


def judge_logits(canary: Canary, prompt: int, found: Sequence[float]) -> float:
    """Return the largest error of the logits of the tokens in `canary.top`, in parts of the spread of all logits."""
    if not all(map(math.isfinite, found)):
        return math.inf
    off = max(abs(value - logit) for (_, logit), value in zip(canary.top[prompt], found, strict=True))
    return off / max(canary.spread[prompt], 1e-30)


def choose_tolerance(canary: Canary, dtype: str, *, chooses: bool = False) -> float:
    """Return the largest deviation that is allowed when the activations have this dtype here.

    `chooses`: the prompt's tokens go to the experts that routers choose.
    """
    if canary.dtype == dtype == "float32":
        return TOLERANCE
    return TOLERANCE_OF_CHOICE if chooses else TOLERANCE_LOW_PRECISION
