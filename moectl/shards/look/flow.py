"""How a state passes through the layers of a skeleton: found by a forward pass of which nothing is computed.

A pipeline is right where each layer gets one state from the layer before it and nothing else that an earlier layer
made: no second output, no cache of another layer, no mask that needs another rank's cache. All of this is looked up in
the graph of that pass, so that a model which is built in another way is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from moectl.model.regions import Span
from moectl.shards.look.graph import Graph
from moectl.shards.look.hooks import Hook, hooked
from moectl.shards.look.skeleton import Skeleton

TOKENS = 2
_LATER = 5000  # tokens in a cache, more than any window


class NoPipeline(Exception):
    """The layers cannot be given to several ranks; says why."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Which cache is whose, and which of the other parameters are used where."""

    caches: tuple[int | None, ...]  # by layer: its cache's number in the model's list
    before: frozenset[str]  # paths of modules whose parameters make the first layer's state,
    after: frozenset[str]  # that are used after the last layer,
    everywhere: frozenset[str]  # and that layers in between want, too

    def wants(self, name: str, *, first: bool, last: bool) -> bool:
        """Whether a rank needs a parameter that is in no layer; `first` and `last`: it has what is at that end."""
        module = name.rpartition(".")[0]
        if module in self.everywhere or module not in self.before | self.after:
            return True
        return (first and module in self.before) or (last and module in self.after)


@dataclass(slots=True)
class _Call:
    state: mx.array
    rest: list[Any]  # what else the layer got: arrays, caches, plain values


def follow(skeleton: Skeleton) -> Flow:
    """Return the flow of a model. Raises NoPipeline where it is not a line of layers."""
    caches = make_prompt_cache(skeleton.model)
    calls, states, logits = _pass(skeleton, caches, real=True)
    owners = _match_caches(calls, caches)
    outer = _outer_parameters(skeleton)
    uses = _Uses(calls, states, logits, outer)
    for number, call in enumerate(calls):
        if uses.states_of([call.state]) - {number - 1}:
            raise NoPipeline(f"layer {number} takes the states of several layers")
        if uses.states_of(_arrays(call.rest)):
            raise NoPipeline(f"layer {number} takes more from earlier layers than their state")
    if uses.states_of([logits]) != {len(calls) - 1}:
        raise NoPipeline("what comes after the last layer takes the states of several layers")
    _check_masks(skeleton, caches, owners)
    before = uses.parameters_of([calls[0].state, *_arrays(calls[0].rest)])
    after = uses.parameters_of([logits])
    between = uses.parameters_of([a for call in calls[1:] for a in (call.state, *_arrays(call.rest))])
    unseen = set(outer) - before - after - between
    return Flow(tuple(owners), _modules_of(before), _modules_of(after), _modules_of(between | unseen))


def kind_of(cache: Any) -> Any:
    """Return what two caches share that can stand in for each other where a mask is made."""
    size = getattr(cache, "max_size", None)
    return type(cache), size, tuple(kind_of(part) for part in getattr(cache, "caches", ()))


def choose_caches(own: Collection[int], whole: list[Any]) -> list[int | None]:
    """Return for each cache of a model which one of a rank's own stands for it: itself, or one of the same kind."""
    by_kind: dict[Any, int] = {}
    for number in own:
        by_kind.setdefault(kind_of(whole[number]), number)
    return [number if number in own else by_kind.get(kind_of(cache)) for number, cache in enumerate(whole)]


def names_of_rank(skeleton: Skeleton, flow: Flow, span: Span, *, first: bool, last: bool) -> set[str]:
    """Return the names of the parameters that a rank needs which has a span of the layers.

    `first`: it also has what comes before the layers. `last`: it also has what comes after them.
    """
    paths = skeleton.paths
    layers = [f"{paths[id(layer)]}." for layer in skeleton.layers]
    own, all_layers = tuple(layers[slice(*span)]), tuple(layers)
    return {
        name
        for name in skeleton.parameters
        if name.startswith(own) or (not name.startswith(all_layers) and flow.wants(name, first=first, last=last))
    }


def _pass(skeleton: Skeleton, caches: list[Any], *, real: bool) -> tuple[list[_Call], list[mx.array], mx.array]:
    """Run two tokens through the model, with a new state after each layer; return what layers got and gave."""
    calls: dict[int, _Call] = {}
    states: dict[int, mx.array] = {}

    def hook(number: int, call: Hook, *args: Any, **kwargs: Any) -> mx.array:
        if number in calls:
            raise NoPipeline(f"layer {number} is used more than once for a token")
        if not args or not isinstance(args[0], mx.array):
            raise NoPipeline(f"layer {number} does not take a state first")
        calls[number] = _Call(args[0], [*args[1:], *kwargs.values()])
        found = call(*args, **kwargs) if real else args[0]
        if not isinstance(found, mx.array) or found.shape != args[0].shape:
            raise NoPipeline(f"layer {number} gives more than one state")
        states[number] = mx.broadcast_to(mx.array(0, dtype=found.dtype), found.shape)
        return states[number]

    layers = skeleton.layers
    with hooked((layer, partial(hook, number)) for number, layer in enumerate(layers)):
        logits = skeleton.model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=caches)
    if list(calls) != list(range(len(layers))):
        raise NoPipeline("the layers are not used one after the other")
    return list(calls.values()), list(states.values()), logits


def _match_caches(calls: list[_Call], caches: list[Any]) -> list[int | None]:
    numbers = {id(part): number for number, cache in enumerate(caches) for part in _with_parts(cache)}
    owners: list[int | None] = []
    for layer, call in enumerate(calls):
        used = set()
        for value in _leaves(call.rest):
            if id(value) in numbers:
                used.add(numbers[id(value)])
            elif not isinstance(value, mx.array | str | int | float | None):
                raise NoPipeline(f"layer {layer} takes a {type(value).__name__} that other layers may share")
        if len(used) > 1 or used & set(owners):
            raise NoPipeline(f"layer {layer} uses the cache of another layer")
        owners.append(used.pop() if used else None)
    return owners


def _check_masks(skeleton: Skeleton, caches: list[Any], owners: list[int | None]) -> None:
    """See that each layer gets the same masks where its rank has no other layer's cache."""
    for cache in caches:
        for part in _with_parts(cache):
            if isinstance(getattr(part, "offset", None), int):
                part.offset = _LATER
    wanted, _, _ = _pass(skeleton, caches, real=False)
    for number, owner in enumerate(owners):
        if owner is None:
            continue
        spare = make_prompt_cache(skeleton.model)
        chosen = choose_caches([owner], spare)
        mixed = [new if choice is None else caches[choice] for choice, new in zip(chosen, spare, strict=True)]
        calls, _, _ = _pass(skeleton, mixed, real=False)
        if not _are_equal(wanted[number].rest, calls[number].rest):
            raise NoPipeline(f"layer {number} gets a mask or positions that another layer's cache decides")


def _are_equal(some: list[Any], others: list[Any]) -> bool:
    pairs = list(zip(_leaves(some), _leaves(others), strict=True))
    return all(
        mx.array_equal(one, other).item() if isinstance(one, mx.array) and isinstance(other, mx.array) else one == other
        for one, other in pairs
        if isinstance(one, mx.array | str | int | float | None)
    )


class _Uses:
    """What arrays of the pass are made of."""

    def __init__(
        self, calls: list[_Call], states: list[mx.array], logits: mx.array, outer: dict[str, mx.array]
    ) -> None:
        named = {f"state {number}": array for number, array in enumerate(states)}
        named |= {f"parameter {name}": array for name, array in outer.items()}
        self._graph = Graph([a for call in calls for a in (call.state, *_arrays(call.rest))] + [logits], named)

    def states_of(self, arrays: list[mx.array]) -> set[int]:
        """Return the numbers of the layers whose states these arrays are made of."""
        found = self._graph.find_sources(arrays)
        return {int(name.split()[1]) for name in found if name.startswith("state ")}

    def parameters_of(self, arrays: list[mx.array]) -> set[str]:
        """Return the names of the parameters that these arrays are made of, not counting those behind a state."""
        found = self._graph.find_sources(arrays)
        return {name.partition(" ")[2] for name in found if name.startswith("parameter ")}


def _modules_of(names: set[str]) -> frozenset[str]:
    return frozenset(name.rpartition(".")[0] for name in names)  # a quantised one has more parameters


def _outer_parameters(skeleton: Skeleton) -> dict[str, mx.array]:
    paths = skeleton.paths
    inner = tuple(f"{paths[id(layer)]}." for layer in skeleton.layers)
    return {name: array for name, array in skeleton.parameters.items() if not name.startswith(inner)}


def _with_parts(cache: Any) -> Iterator[Any]:
    yield cache
    for part in getattr(cache, "caches", ()):
        yield from _with_parts(part)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _arrays(values: list[Any]) -> list[mx.array]:
    return [value for value in _leaves(values) if isinstance(value, mx.array)]
