"""Where the time of a decode step goes on one rank, and which experts its router chose.

The same tokens go through every rank: all but the last few as a prompt, those one by one, the first of them untimed.
The timed steps have barriers that ordinary steps do not have, so this measures only the parts of a step, not speeds:

- compute: waiting for the evaluation of what this rank adds to an exchange (attention, router, its experts), and of
  what follows the last one (norm, head). The evaluation starts when the layer's graph is built; building is not in it.
- all-reduce: waiting for an exchange whose input is ready here. It contains waiting for the slowest rank, so the rank
  that computes longest shows what the network costs.
- the rest of an ordinary step (graphs built on the host, sampling, the exchange of the token) is the difference between
  that step's time and both. It is negative where barriers cost more than the rest: each adds a wake-up, some 10 µs, and
  ends the overlap of building one layer with computing the one before.

It costs no time while no profile runs: exchanges are observed through `network.exchange`, and the experts are watched
only meanwhile.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.exchange import Exchange, observed
from moectl.engine.network.experts import waits_for_host
from moectl.engine.network.routing import count_experts
from moectl.engine.protocol import Prefilled, Profile, Profiled
from moectl.model.balance import share_out
from moectl.model.ownership import own
from moectl.model.placement import Placement
from moectl.model.regions import Role
from moectl.model.structure import Layer, Part
from moectl.shards.look.hooks import Hook, hooked
from moectl.shards.look.routers import Stack, find_stacks


def profile(
    model: Any,
    order: Profile,
    *,
    placement: Placement,
    rank: int,
    leads: bool,
    prefill_step: int,
    stream: mx.Stream,
) -> Iterator[Prefilled | Profiled]:
    """Run an order's tokens through the model, in step with all other ranks; caches are thrown away.

    A layer without experts has no choices to count, and the work is that of the layers which have some.
    Yields Prefilled on the leader, so that a long prompt shows progress, and Profiled at the end on every rank.
    """
    # Before this adds a cache of its own.
    peak_memory_bytes, peak_rss_bytes = mx.get_peak_memory(), _peak_rss_bytes()
    routing = _Routing(placement, rank)
    clock = _Clock()
    cache = make_prompt_cache(model)
    prompt, single = order.tokens[: -order.steps - 1], order.tokens[-order.steps - 1 :]
    with _watched(model, placement, routing, clock):
        for start in range(0, len(prompt), prefill_step):
            with mx.stream(stream):
                model(mx.array([prompt[start : start + prefill_step]]), cache=cache)
                mx.eval([c.state for c in cache], routing.pending)
            routing.count()
            if leads:
                yield Prefilled(order.id, min(start + prefill_step, len(prompt)))
        with mx.stream(stream), observed(clock.exchange):
            for number, token in enumerate(single):
                if number == 1:  # the first one compiled kernels
                    clock.reset()
                clock.step(model, token, cache)
                routing.count()
    mx.synchronize(stream)
    tokens = max(1, routing.tokens)
    yield Profiled(
        order.id,
        compute_s=clock.compute_s / order.steps,
        all_reduce_s=clock.all_reduce_s / order.steps,
        step_s=clock.step_s / order.steps,
        exchanges=clock.exchanges // order.steps,
        peak_memory_bytes=peak_memory_bytes,
        peak_rss_bytes=peak_rss_bytes,
        layers=list(range(*placement.layers(rank))),
        chosen=[routing.chosen[layer].tolist() for layer in range(*placement.layers(rank))],
        own_experts=routing.own / tokens,
        busiest_experts=routing.busiest / tokens,
    )


class _Clock:
    """Seconds that this rank waited, by reason."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.compute_s = self.all_reduce_s = self.step_s = 0.0
        self.exchanges = 0
        self.runs = False

    def step(self, model: Any, token: int, cache: Any) -> None:
        begin = time.perf_counter()
        self.runs = True
        self.compute(model(mx.array([[token]]), cache=cache), [c.state for c in cache])
        self.runs = False
        self.step_s += time.perf_counter() - begin

    def compute(self, *work: Any) -> None:
        begin = time.perf_counter()
        mx.eval(*work)
        self.compute_s += time.perf_counter() - begin

    def exchange(self, x: mx.array, exchange: Exchange) -> mx.array:
        self.compute(x)
        total = exchange(x)
        begin = time.perf_counter()
        mx.eval(total)
        self.all_reduce_s += time.perf_counter() - begin
        self.exchanges += 1
        return total


class _Routing:
    """Which experts were chosen, and how much of that work each rank has."""

    def __init__(self, placement: Placement, rank: int) -> None:
        self._rank = rank
        self._parts = _held_parts(placement)
        self._owners = placement.owners if placement.replicas > 1 else None
        self._seen: list[tuple[int, mx.array]] = []
        self.chosen = [np.zeros(experts, dtype=np.int64) for experts in count_experts(placement.structure)]
        self.tokens = 0  # × layers with experts
        self.own = 0.0
        self.busiest = 0.0

    @property
    def pending(self) -> list[mx.array]:
        """Choices that have been built and are not counted yet."""
        return [indices for _, indices in self._seen]

    def saw(self, layer: int, indices: mx.array) -> None:
        self._seen.append((layer, indices))

    def count(self) -> None:
        for layer, indices in self._seen:
            experts = np.array(indices).astype(np.int64).reshape(-1, indices.shape[-1])  # (T, K)
            self.chosen[layer] += np.bincount(experts.ravel(), minlength=self.chosen[layer].size)
            work = self._share(layer, experts)  # (ranks, T)
            self.tokens += experts.shape[0]
            self.own += float(work[self._rank].sum())
            self.busiest += float(work.max(axis=0).sum())
        self._seen.clear()

    def _share(self, layer: int, experts: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        parts = self._parts[layer]
        if self._owners is not None:
            return _share_copies(self._owners, parts.shape[0], experts)
        return parts[:, experts].sum(axis=-1)  # type: ignore[no-any-return]


def _share_copies(
    owners: tuple[tuple[int, ...], ...], ranks: int, experts: np.ndarray[Any, np.dtype[np.int64]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how many of each token's (T, K) experts each rank runs, (ranks, T), where experts have copies.

    As in decode, where each token's choice is shared out separately.
    """
    work = np.zeros((ranks, experts.shape[0]))
    for token, chosen in enumerate(experts.tolist()):
        for share in share_out(dict.fromkeys(chosen, 1), owners).values():
            for rank, count in share.items():
                work[rank, token] += count
    return work


def _held_parts(placement: Placement) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Return by layer how much of each expert each rank holds, (ranks, experts), 1 = all of it."""
    return [_held_part(placement, layer) for layer in placement.structure.layers]


def _held_part(placement: Placement, layer: Layer) -> np.ndarray[Any, np.dtype[np.float64]]:
    stack = max(layer.parts, key=lambda part: part.experts, default=Part())
    parts = np.zeros((placement.world_size, stack.experts))
    pieces = stack.pieces(placement.split)
    for rank in range(placement.world_size):
        if pieces is None or pieces.role is not Role.EXPERT:
            parts[rank] = placement.fraction(stack, rank)
        else:
            held = placement.held or [range(*span) for span in own(pieces, placement.shares) or ()]
            parts[rank, list(held[rank])] = 1.0
    return parts


@contextlib.contextmanager
def _watched(model: Any, placement: Placement, routing: _Routing, clock: _Clock) -> Iterator[None]:
    """Note what the experts of all layers are called with."""
    chooses = placement.split == "experts"  # a rank's own pairs are chosen on the host

    def watch(stack: Stack, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> Any:
        routing.saw(stack.layer, indices)
        if not (clock.runs and (chooses or waits_for_host(stack.module, indices))):
            return call(x, indices, *args)
        # Where the experts wait for their input, and perhaps compute on the host, that wait is compute as well.
        begin = time.perf_counter()
        y = call(x, indices, *args)
        clock.compute_s += time.perf_counter() - begin
        return y

    with hooked((stack.module, partial(watch, stack)) for stack in find_stacks(model)):
        yield


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
