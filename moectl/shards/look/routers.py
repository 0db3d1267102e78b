"""Stacks of experts in a model, and the modules that choose among them: found by looking, in every family.

A router is a module outside of the stacks of whose result a stack's indices are directly made, and whose result has a
number for each expert, or for each that was chosen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from moectl.errors import UsageError
from moectl.shards.look.flow import TOKENS
from moectl.shards.look.graph import Graph
from moectl.shards.look.hooks import Hook, hooked, uncompiled
from moectl.shards.look.skeleton import Skeleton
from moectl.shards.look.units import is_unit


@dataclass(frozen=True, slots=True)
class Stack:
    """All experts of a layer; it is called with a state and the numbers of experts."""

    layer: int
    path: str  # from the layer
    module: Any


def find_stacks(model: Any) -> list[Stack]:
    """Return the stacks of experts of all layers, in order."""
    return [
        Stack(number, path, module)
        for number, layer in enumerate(model.layers)
        for path, module in layer.named_modules()
        if isinstance(module, SwitchGLU | SwitchMLP)
    ]


def find_last_unit(model: Any) -> Any:
    """Return the last unit of the last layer that has one that every token goes to, or else the last layer."""
    for layer in reversed(model.layers):
        found = [(path, module) for path, module in layer.named_modules() if path and is_unit(module)]
        usual = {path: module for path, module in found if not any(name.isdigit() for name in path.split("."))}
        if usual:
            return usual[max(usual)]
    return model.layers[-1]


def find_routers(skeleton: Skeleton) -> list[str]:
    """Return the paths of a model's routers. Raises UsageError where it has no experts, or one has no router."""
    stacks = find_stacks(skeleton.model)
    if not stacks:
        raise UsageError(
            f"a {skeleton.model_type} model has no experts: its ranks have no choice to agree on",
            hint="leave --agree-routing out",
        )
    with uncompiled():
        return _Pass(skeleton, stacks).find()


class _Pass:
    """A forward pass of which nothing is computed, and in which modules around stacks give new arrays."""

    def __init__(self, skeleton: Skeleton, stacks: list[Stack]) -> None:
        self._skeleton = skeleton
        self._stacks = stacks
        self._results: dict[str, mx.array] = {}  # by the path of a module, and a number
        self._chosen: dict[int, mx.array] = {}  # indices, by the number of a stack

    def find(self) -> list[str]:
        model = self._skeleton.model
        hooks = [(stack.module, partial(self._note_indices, n)) for n, stack in enumerate(self._stacks)]
        hooks += [(module, partial(self._replace_result, path)) for path, module in self._find_candidates()]
        with hooked(hooks):
            model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=make_prompt_cache(model))
        graph = Graph(self._chosen.values(), self._results)
        paths = {}
        for number, indices in self._chosen.items():
            numbers = [(self._count_experts(number),), (indices.shape[-1],)]
            found = [name for name in graph.find_sources([indices]) if self._results[name].shape[-1:] in numbers]
            routers = {name.partition(" ")[0] for name in found}
            if not routers:
                stack = self._stacks[number]
                raise UsageError(
                    f"moectl does not find what chooses the experts of layer {stack.layer} of a"
                    f" {self._skeleton.model_type} model",
                    hint="leave --agree-routing out",
                )
            paths.update(dict.fromkeys(sorted(routers)))
        return list(paths)

    def _count_experts(self, number: int) -> int:
        first = next(iter(self._stacks[number].module.children().values()))
        return int(first.weight.shape[0])

    def _find_candidates(self) -> Iterator[tuple[str, Any]]:
        """Yield the outermost modules of layers that have no stack inside and are in none."""
        by_layer: defaultdict[int, list[str]] = defaultdict(list)
        for stack in self._stacks:
            by_layer[stack.layer].append(stack.path)
        paths = self._skeleton.paths
        for number, stacks in by_layer.items():
            holders = {path.rsplit(".", depth)[0] for path in stacks for depth in range(1, path.count(".") + 1)} | {""}
            for path, module in self._skeleton.layers[number].named_modules():
                if path and path.rpartition(".")[0] in holders and path not in holders and path not in stacks:
                    yield paths[id(module)], module

    def _note_indices(self, number: int, call: Hook, x: mx.array, indices: mx.array, *args: Any) -> Any:
        self._chosen.setdefault(number, indices)
        return call(x, indices, *args)

    def _replace_result(self, path: str, call: Hook, *args: Any, **kwargs: Any) -> Any:
        found = tree_map(_make_new, call(*args, **kwargs))
        arrays = [array for _, array in tree_flatten([found]) if isinstance(array, mx.array)]
        self._results |= {f"{path} {len(self._results) + n}": array for n, array in enumerate(arrays)}
        return found


def _make_new(value: Any) -> Any:
    return mx.zeros(value.shape, value.dtype) if isinstance(value, mx.array) else value
