"""Make a stage of a pipeline out of a whole model of mlx-lm: the `layers` split, and ranks without the head.

Every layer keeps its number. Those of other ranks let the state pass; the one before a stage's first layer receives it.
After a stage's last layer the pass ends: the state is sent on, and a head that is another rank's is not computed. What
a model does before its layers and after them (masks, scaling) stays mlx-lm's.

Of a prompt's chunk the last stage waits for all others' work. So what is received is evaluated before anything depends
on it, and the state before it is sent. A single token goes on without that: it comes within a step's time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.exchange import run_exchange
from moectl.model.regions import Span
from moectl.shards.look.flow import Flow, choose_caches
from moectl.shards.look.hooks import Hook, hook_call

Group = Any  # mx.distributed.Group


class _End(Exception):
    """A stage's last layer is done."""

    def __init__(self, state: mx.array) -> None:
        self.state = state


def make_stage(model: nn.Module, flow: Flow, spans: Sequence[Span], rank: int, group: Group) -> None:
    """Let a model compute the layers of one rank; `spans` are those of all ranks."""
    _Stage(model, flow, spans[rank], rank, group, has_head=rank == len(spans) - 1).install()


def remove_head(model: nn.Module, flow: Flow) -> None:
    """Let a model end after its last layer, on a rank that is not asked for logits."""
    _Stage(model, flow, (0, len(model.layers)), 0, None, has_head=False).install()


def keep(model: nn.Module, names: Collection[str]) -> None:
    """Replace all parameters but these by zeros that take no memory."""
    others = [
        (name, mx.broadcast_to(mx.array(0, dtype=array.dtype), array.shape))
        for name, array in tree_flatten(model.parameters())
        if name not in names
    ]
    model.update(tree_unflatten(others))


class _Stage:
    def __init__(self, model: Any, flow: Flow, span: Span, rank: int, group: Group, *, has_head: bool) -> None:
        self._model, self._rank, self._group = model, rank, group
        self._first, self._last = span
        self._has_head = has_head
        self._dtype = mx.float32  # of the state, as the model's embedding makes it
        self._make_caches = partial(make_prompt_cache, _Original(model))
        owned = {number for number in flow.caches if number is not None}
        mine = {number for number in flow.caches[slice(*span)] if number is not None}
        self._is_stateless = not mine
        whole = self._make_caches()
        # A cache that is no layer's is used before the first one, on every rank.
        self._own = [number for number in range(len(whole)) if number in mine or number not in owned]
        choice = choose_caches(self._own, whole)
        self._places = [None if number is None else self._own.index(number) for number in choice]

    def install(self) -> None:
        for number, layer in enumerate(self._model.layers):
            hook_call(layer, partial(self._pass_layer, number))
        hook_call(self._model, self._run)
        self._model.make_cache = self._make_own_caches

    def _make_own_caches(self) -> list[Any]:
        whole = self._make_caches()
        return [whole[number] for number in self._own]

    def _pass_layer(self, number: int, call: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if number == 0:
            self._dtype = x.dtype
        if number == self._first - 1:
            return self._receive(x.shape)
        if not self._first <= number < self._last:
            return x
        state: mx.array = call(x, *args, **kwargs)
        if number == self._last - 1 and not self._has_head:
            raise _End(state)
        return state

    def _run(self, call: Hook, inputs: mx.array, cache: list[Any] | None = None, **kwargs: Any) -> mx.array:
        """Return logits (B, L, V); (B, L, 1) zeros without the head, which depend on what was sent or computed."""
        try:
            logits: mx.array = call(inputs, cache=None if cache is None else self._fill(cache), **kwargs)
        except _End as end:
            state = end.state if self._group is None else self._send(end.state.astype(self._dtype), cache or [])
            logits = mx.depends([mx.zeros((*inputs.shape, 1), dtype=self._dtype)], [state])[0]
        if self._is_stateless or not cache:  # what evaluates caches only, as at prefill, would leave exchanges out
            mx.eval(logits)
        return logits

    def _fill(self, own: list[Any]) -> list[Any]:
        spare = self._make_caches() if None in self._places else []
        return [spare[number] if place is None else own[place] for number, place in enumerate(self._places)]

    def _receive(self, shape: tuple[int, ...]) -> mx.array:
        source, group = self._rank - 1, self._group
        return run_exchange(
            mx.zeros((0,)),
            lambda _: mx.distributed.recv(shape, self._dtype, source, group=group),
            waits=_is_chunk(shape),
        )

    def _send(self, state: mx.array, caches: list[Any]) -> mx.array:
        sent = run_exchange(
            state,
            lambda x: mx.distributed.send(x, self._rank + 1, group=self._group),
            waits=_is_chunk(state.shape),
        )
        if self._is_stateless or not any(_tie(cache, sent) for cache in reversed(caches)):
            mx.eval(sent)
        return sent


class _Original:
    """A model's layers and its own `make_cache`, for mlx-lm's `make_prompt_cache`."""

    def __init__(self, model: Any) -> None:
        self.layers = model.layers
        if hasattr(model, "make_cache"):
            self.make_cache = model.make_cache


def _is_chunk(shape: Sequence[int]) -> bool:
    """Whether a state (B, L, …) is of more than one token each."""
    return shape[1] > 1


def _tie(cache: Any, sent: mx.array) -> bool:
    """Let evaluating a cache's state send, too; return whether the cache could do that."""
    if hasattr(cache, "caches"):
        return any(_tie(part, sent) for part in cache.caches)
    if isinstance(getattr(cache, "keys", None), mx.array):
        cache.keys = mx.depends([cache.keys], [sent])[0]
        return True
    for number, array in enumerate(getattr(cache, "cache", ())):
        if isinstance(array, mx.array):
            cache.cache[number] = mx.depends([array], [sent])[0]
            return True
    return False
