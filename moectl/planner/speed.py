"""How fast it will be: the paper's performance model (arXiv 2506.23635, section 5), for every split. Pure arithmetic.

For each token and each layer, with M bytes read and F operations made on a node of bandwidth B and peak P:

    t_node  = max(M / (e_m·B), F / (e_c·P))         e_m, e_c: efficiencies (calibration)
    t_layer = E[max over nodes of t_node] + t_host + c · t_coll      (t_host: + t_sync in `experts`)
    t_coll  = L + (N-2)·L' + bytes on the wire / W   L, L', W: latency, per node, bandwidth (calibration)
    t_token = sum of t_layer over the layers + t_head + t_agree

M are the node's parts of the layer, with the experts that it computes, and its caches. In `experts` the number of these
experts is random: all C(E, k) choices of k experts are equally likely, and the nodes get (c_1 … c_N) of them with the
probability ∏ C(s_n, c_n) / C(E, k). The expectation of the slowest node is the exact sum over all (c_1 … c_N); with
copies, over choices as the ranks share them: all, or many at random where there are too many.
In `hidden` every node reads its share of k experts; so it does in `tensor`, with the collectives of divided attention
besides. In `layers` the nodes work one after the other, and N-1 hand-overs per token take the place of the collectives.

Prefill is the same with T tokens at once: F grows with T, M does not, and every expert is read.
`calibration` holds the constants and their sources; `memory` says what fits.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from moectl.model.balance import share_out
from moectl.model.ownership import own
from moectl.model.placement import Placement
from moectl.model.regions import Pieces, Role
from moectl.model.structure import Layer, Part
from moectl.planner.calibration import DEFAULT, USUAL_LAUNCHES, Calibration, LinkCost
from moectl.planner.measured import Speed
from moectl.planner.memory import METAL_DTYPE_BYTES, PREFILL_TOKENS, count_kinds, count_read

GATHER_BELOW_BYTES = 64 * 1024  # as in `engine.network.exchange`, which needs mlx
_MOST_CHOICES = 4000  # of experts
TOKEN_BYTES = 12  # the agreed vector: a token and two control words


@dataclass(frozen=True, slots=True)
class Rates:
    """What a node reaches, efficiencies applied."""

    bytes_s: float
    flops_s: float
    overhead_s: float | None = None  # per layer; None: the calibration's


@dataclass(frozen=True, slots=True)
class Prediction:
    """The expected speed of one answer at a time."""

    decode_tok_s: float
    prefill_tok_s: float
    ttft_s: float
    communication_share: float  # of the time per token
    collectives_per_token: int


@dataclass(frozen=True, slots=True)
class Work:
    """A placement and its use: what the nodes have to compute."""

    placement: Placement
    context: int
    prompt_tokens: int
    dtype_bytes: int = METAL_DTYPE_BYTES


def predict(work: Work, rates: Sequence[Rates], link: LinkCost, calibration: Calibration) -> Prediction:
    """Predict speed on nodes of these rates, one per rank, joined by links of one kind."""
    model = _Model(work, tuple(rates), link, calibration)
    compute, communication = model.pass_time(1)
    chunks = (min(PREFILL_TOKENS, work.prompt_tokens - done) for done in range(0, work.prompt_tokens, PREFILL_TOKENS))
    prefill = sum(sum(model.pass_time(tokens)) for tokens in chunks)
    return _make_prediction(work, compute + communication, prefill, communication, calibration)


def predict_measured(work: Work, speed: Speed) -> Prediction:
    """Predict the whole model's speed from that of a shortened model on the same nodes, by its layers.

    Another context than the measured one changes how much of the cache is read: at the rate of reading weights.
    """
    structure = work.placement.structure
    slowest = min(rank.bytes_s for rank in speed.ranks) or math.inf
    more = _cached(work, 0, work.context) - _cached(work, 0, speed.context)
    decode = max(speed.decode.total_s(structure.n_layers) + more / slowest, speed.decode.outer_s)
    prefill = speed.prefill.total_s(structure.n_layers) * work.prompt_tokens / speed.prefill.tokens
    exchange = speed.collective_s.get(structure.width * work.dtype_bytes, 0.0)
    return _make_prediction(work, decode, prefill, _count_collectives(work.placement, DEFAULT) * exchange, DEFAULT)


def _cached(work: Work, rank: int, context: int) -> float:
    """Return the bytes of caches that a rank reads for one token."""
    kinds = count_kinds(work.placement, rank).items()
    return sum(n * count_read(work.placement, layer, rank, context, work.dtype_bytes) for layer, n in kinds)


def _make_prediction(
    work: Work, decode_s: float, prefill_s: float, communication_s: float, calibration: Calibration
) -> Prediction:
    return Prediction(
        decode_tok_s=1 / decode_s,
        prefill_tok_s=work.prompt_tokens / prefill_s,
        ttft_s=prefill_s,
        communication_share=min(1.0, communication_s / decode_s),
        collectives_per_token=_count_collectives(work.placement, calibration),
    )


def _count_collectives(placement: Placement, calibration: Calibration) -> int:
    """Return the exchanges per token, that of the agreed token included."""
    return _count_exchanges(placement) + (calibration.agreement and placement.world_size > 1)


def _count_exchanges(placement: Placement) -> int:
    """Return the exchanges of one pass through all layers."""
    ranks = placement.world_size
    if ranks == 1:
        return 0
    if placement.split == "layers":
        return ranks - 1
    heads = placement.divides_heads
    return sum(layer.sums + layer.head_sums * heads for layer in placement.structure.layers)


def expected_busiest(shares: Sequence[int], top_k: int, cost: Callable[[int, int], float] = lambda _, c: c) -> float:
    """Return the expectation over all choices of `top_k` experts of the largest cost(node, experts chosen there).

    `shares` are experts per node, disjoint. With the default cost: the busiest node's number of experts, 2.65 for
    (8, 8) and 1.97 for (4, 4, 4, 4) at top 4 (facts of the paper, table 3).
    """
    return _expect(_loads(tuple(shares), top_k), cost)


def expected_busiest_of_copies(
    owners: Sequence[Sequence[int]], top_k: int, cost: Callable[[int, int], float] = lambda _, c: c
) -> float:
    """Return `expected_busiest` where experts have copies: each choice is shared as the ranks share it.

    `owners` are the nodes that hold each expert. 1.16 for two copies on each of 4 nodes' 8 places, top 4 of 16.
    """
    return _expect(_loads_of_copies(tuple(map(tuple, owners)), top_k), cost)


def _expect(loads: Counter[tuple[int, ...]], cost: Callable[[int, int], float]) -> float:
    return sum(n * max(cost(node, c) for node, c in enumerate(load)) for load, n in loads.items()) / loads.total()


@lru_cache(maxsize=64)
def _loads(shares: tuple[int, ...], top_k: int) -> Counter[tuple[int, ...]]:
    """Count how many choices of experts lead to each list of experts per node."""
    return Counter({counts: math.prod(map(math.comb, shares, counts)) for counts in _divide(top_k, shares)})


@lru_cache(maxsize=64)
def _loads_of_copies(owners: tuple[tuple[int, ...], ...], top_k: int) -> Counter[tuple[int, ...]]:
    nodes = range(max(rank for ranks in owners for rank in ranks) + 1)
    found: Counter[tuple[int, ...]] = Counter()
    for chosen in _choose(len(owners), top_k):
        shares = share_out(dict.fromkeys(chosen, 1), owners).values()
        found[tuple(sum(share.get(node, 0) for share in shares) for node in nodes)] += 1
    return found


def _choose(count: int, top_k: int) -> Iterator[tuple[int, ...]]:
    """Yield every choice of experts; where there are too many, as many random ones, always the same."""
    if math.comb(count, top_k) <= _MOST_CHOICES:
        yield from combinations(range(count), top_k)
        return
    dice = random.Random(0)
    yield from (tuple(sorted(dice.sample(range(count), top_k))) for _ in range(_MOST_CHOICES))


def _divide(count: int, limits: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield every way to take `count` things from boxes of these sizes."""
    if not limits:
        yield from [()] * (count == 0)
        return
    for head in range(min(count, limits[0]) + 1):
        yield from ((head, *rest) for rest in _divide(count - head, limits[1:]))


@dataclass(frozen=True, slots=True)
class _Model:
    work: Work
    rates: tuple[Rates, ...]
    link: LinkCost
    calibration: Calibration

    def pass_time(self, tokens: int) -> tuple[float, float]:
        """Return (compute, communication) in seconds of a pass of this many tokens through all layers and the head."""
        placement = self.work.placement
        ranks = range(placement.world_size)
        compute = self._overhead()
        if placement.split == "layers":
            for rank in ranks:
                kinds = count_kinds(placement, rank).items()
                compute += sum(count * self._node_time(layer, rank, None, tokens) for layer, count in kinds)
        else:
            kinds = count_kinds(placement, 0).items()
            compute += sum(count * self._slowest(layer, tokens) for layer, count in kinds)
        return compute + self._head_time(), self._communication(tokens)

    def _overhead(self) -> float:
        """Return the seconds that all layers take however little they read."""
        placement = self.work.placement
        usual = self.calibration
        waits = placement.split == "experts" and placement.world_size > 1
        total = 0.0
        for layer in placement.structure.layers:
            own = usual.layer_overhead_s + usual.launch_s * (layer.launches or USUAL_LAUNCHES)
            total += max(own if rate.overhead_s is None else rate.overhead_s for rate in self.rates)
            total += usual.sync_s * (waits and any(part.is_shared_out for part in layer.parts))
        return total

    def _communication(self, tokens: int) -> float:
        placement, nodes = self.work.placement, len(self.rates)
        message = tokens * placement.structure.width * self.work.dtype_bytes
        each = _exchange_time(self.link, 2 if placement.split == "layers" else nodes, message)
        agreed = _exchange_time(self.link, nodes, TOKEN_BYTES) if self.calibration.agreement else 0.0
        return _count_exchanges(placement) * each + agreed

    def _slowest(self, layer: Layer, tokens: int) -> float:
        """Return the expected time of the slowest node in one layer."""
        placement = self.work.placement
        ranks = range(placement.world_size)
        stack = next((part for part in layer.parts if part.is_shared_out), None)
        if placement.split != "experts" or stack is None or tokens > 1:
            return max(self._node_time(layer, rank, None, tokens) for rank in ranks)
        # Thousands of choices lead to only a few different times.
        times = [[self._node_time(layer, rank, n, 1) for n in range(stack.top_k + 1)] for rank in ranks]
        if placement.held is not None:
            return expected_busiest_of_copies(placement.owners, stack.top_k, lambda rank, n: times[rank][n])
        spans = own(Pieces(Role.EXPERT, stack.experts), placement.shares)
        assert spans is not None  # experts can always be shared out
        held = [stop - start for start, stop in spans]
        return expected_busiest(held, stack.top_k, lambda rank, n: times[rank][n])

    def _node_time(self, layer: Layer, rank: int, chosen: int | None, tokens: int) -> float:
        """Return the seconds of one layer on a node; `chosen`: how many of the token's experts it computes."""
        rates = self.rates[rank]
        read = count_read(self.work.placement, layer, rank, self.work.context, self.work.dtype_bytes)
        operations = 0.0
        for part in layer.parts:
            share, pairs = self._used(part, rank, chosen, tokens)
            read += part.count_bytes(self.work.dtype_bytes) * share
            operations += 2 * part.values * pairs
        return max(read / rates.bytes_s, operations / rates.flops_s)

    def _used(self, part: Part, rank: int, chosen: int | None, tokens: int) -> tuple[float, float]:
        """Return (how much of a part a node reads, how often it multiplies with all of it)."""
        share = self.work.placement.fraction(part, rank)
        if not part.experts:
            return share, tokens * share
        if chosen is not None and part.is_shared_out:
            return chosen / part.experts, chosen / part.experts
        used = 1 - (1 - part.active) ** tokens  # the expected part of its experts that these tokens choose
        if self.work.placement.held is not None and part.is_shared_out:
            shares = self.work.placement.shares  # copies of an expert share its tokens
            return used * share, tokens * part.active * shares[rank] / sum(shares)
        return used * share, tokens * part.active * share

    def _head_time(self) -> float:
        placement = self.work.placement
        head = placement.head_rank
        held = (outer for outer in placement.structure.outer if placement.holds_outer(outer, head))
        # Of the embedding one row is read.
        read = sum(outer.part.count_bytes(self.work.dtype_bytes) for outer in held if outer.last or not outer.first)
        return read / self.rates[head].bytes_s


def _exchange_time(link: LinkCost, nodes: int, message_bytes: int) -> float:
    """Return the seconds until every node has the messages of all others."""
    if nodes == 1:
        return 0.0
    return link.latency_s + (nodes - 2) * link.per_node_s + (nodes - 1) * message_bytes / link.bytes_s


def count_token_bytes(placement: Placement, dtype_bytes: int) -> int:
    """Return the bytes that one rank sends per token in the exchanges of all layers, without the agreed token."""
    ranks = placement.world_size
    row = placement.structure.width * dtype_bytes
    if ranks > 1 and placement.split == "layers":
        return row  # one hand-over to the next rank
    # Small rows are gathered: each goes to all others. Large rows are reduced and spread in N parts.
    each = (ranks - 1) * row if row <= GATHER_BELOW_BYTES else 2 * (ranks - 1) * row // ranks
    return each * _count_exchanges(placement)
