"""Take a hand in the choice of experts, in a model of any family: deal tokens out, or follow the first rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from moectl.engine.network.exchange import share_first
from moectl.model.structure import Structure
from moectl.shards.look.hooks import Hook, hook_call, hooked
from moectl.shards.look.routers import find_routers, find_stacks
from moectl.shards.look.skeleton import Skeleton
from moectl.shards.look.units import at


def count_experts(structure: Structure) -> list[int]:
    """Return the number of stacked experts of each layer; 0 where it has none."""
    return [max((part.experts for part in layer.parts), default=0) for layer in structure.layers]


def deal(first: int, shape: Sequence[int], experts: int) -> mx.array:
    """Return indices of this shape (…, K) that deal tokens out to all experts in turn: they have numbers from `first`.

    Experts of one token are far apart, and no two are the same.
    """
    *tokens, top_k = shape
    numbers = mx.arange(first, first + math.prod(tokens))[:, None]
    chosen = (numbers + mx.arange(top_k) * (experts // top_k)) % experts
    return chosen.reshape(*shape).astype(mx.uint32)


def run_dealt(call: Hook, x: mx.array, indices: mx.array, *args: Any) -> mx.array:
    """Return a stack's results (…, K, D) for experts that were dealt: for each of a token's, the mean of them all.

    So it does not matter in which order a router names those that it chose, nor how it weighs each: devices differ in
    the first, and two experts that are close may change places.
    """
    found: mx.array = call(x, indices, *args)
    return mx.broadcast_to(found.mean(axis=-2, keepdims=True), found.shape)


@contextmanager
def dealt(model: Any, experts: Sequence[int], first: int) -> Iterator[None]:
    """Let all layers' tokens be dealt out, whose numbers begin with `first`; the sum of weights stays the routers'."""

    def hook(layer: int, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> Any:
        return run_dealt(call, x, deal(first, indices.shape, experts[layer]).astype(indices.dtype), *args)

    with hooked((stack.module, partial(hook, stack.layer)) for stack in find_stacks(model)):
        yield


def follow_first_rank(model: Any, skeleton: Skeleton, group: mx.distributed.Group | None) -> None:
    """Let a rank's model take rank 0's choice of experts from now on: chips that round differently choose differently.

    `skeleton` is that of the whole model. Raises UsageError where it has no experts, or one has no router.
    """
    routers = find_routers(skeleton)
    if group is None or group.size() == 1:
        return
    for path in routers:
        hook_call(at(model, path), partial(_take_first, group))
    for stack in find_stacks(model):
        hook_call(stack.module, _wait_for_choice)


def _take_first(group: mx.distributed.Group, call: Hook, *args: Any, **kwargs: Any) -> Any:
    """Return rank 0's result of a router on every rank: all its arrays, in one exchange."""
    found = tree_flatten([call(*args, **kwargs)])
    names = [name for name, value in found if isinstance(value, mx.array)]
    arrays = share_first([value for _, value in found if isinstance(value, mx.array)], group)
    return tree_unflatten([*({**dict(found), **dict(zip(names, arrays, strict=True))}.items())])[0]


def _wait_for_choice(call: Hook, x: mx.array, indices: mx.array, *args: Any) -> Any:
    """Let the result depend on the choice also on a rank that has nothing to do for it: its exchange comes first."""
    return mx.depends([call(x, indices, *args)], [indices])[0]
