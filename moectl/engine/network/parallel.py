"""Make one rank's part out of a whole model of mlx-lm: `hidden`, `experts` and `tensor`.

Modules keep their classes and the names of their parameters. What is installed here are sums over ranks, the choice of
a rank's own experts, and the number of its heads. mlx-lm's blocks that sum by themselves need `exchange.seam`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from moectl.engine.network.exchange import sum_over_ranks
from moectl.engine.network.own_pairs import OwnPairs
from moectl.model.ownership import Held, Holding
from moectl.model.regions import Role, belongs_to_sum, find_regions
from moectl.shards.look.hooks import Hook, hook_call
from moectl.shards.look.units import Block, Heads, LayerParts, Unit, at, narrow

Group = Any  # mx.distributed.Group


def divide(
    model: nn.Module,
    parts: list[LayerParts],
    holdings: Mapping[str, Holding],
    group: Group,
    *,
    rank: int = 0,
    held: Held | None = None,
) -> None:
    """Let a model compute what a rank holds, and sum over all ranks. Its parameters may be cut before or after.

    `held` are the experts of each rank, where they have copies.
    """
    for layer in parts:
        module = at(model, layer.path)
        for block in layer.blocks:
            for unit in block.units:
                path = f"{layer.path}.{unit.path}"
                _divide_unit(at(module, unit.path), unit, holdings[f"{path}.{unit.down}"], rank, held)
        for heads in layer.heads:
            if (holding := holdings.get(f"{layer.path}.{heads.path}.{heads.out}")) is not None:
                _divide_heads(at(module, heads.path), f"{layer.path}.{heads.path}", heads, holding, holdings)
    install_sums(model, parts, holdings, group)


def install_sums(model: nn.Module, parts: list[LayerParts], holdings: Mapping[str, Holding], group: Group) -> None:
    """Let a model sum over all ranks what they have parts of, and divide nothing; `holdings` are any rank's."""
    for layer in parts:
        module = at(model, layer.path)
        for block in layer.blocks:
            _install_sums(module, block, group)
        for heads in layer.heads:
            if f"{layer.path}.{heads.path}.{heads.out}" in holdings:
                hook_call(at(module, heads.path)[heads.out], partial(_sum, group))


def cut(model: nn.Module, holdings: Mapping[str, Holding]) -> None:
    """Cut the parameters of a whole model in place."""
    for path, holding in holdings.items():
        module = at(model, path)
        if isinstance(module, mx.array):
            above, _, name = path.rpartition(".")
            at(model, above)[name] = take(name, module, holding)
        else:
            for name, array in [item for item in module.items() if isinstance(item[1], mx.array)]:
                module[name] = take(name, array, holding)


def take(name: str, array: mx.array, holding: Holding) -> mx.array:
    """Return a rank's part of one array of a module."""
    if belongs_to_sum(name, holding.division):
        return array if holding.adds else mx.zeros_like(array)
    regions, axis = find_regions(name, array.shape, holding.division, holding.spans)
    found = [array[tuple(slice(*span) for span in region)] for region in regions]
    return mx.contiguous(mx.concatenate(found, axis=axis))


def _install_sums(layer: nn.Module, block: Block, group: Group) -> None:
    if block.sums == "own":
        owner = next(m for _, m in at(layer, block.path).named_modules() if hasattr(m, "sharding_group"))
        owner.sharding_group = group if group is not None and group.size() > 1 else None
    elif block.sums == "block":
        hook_call(at(layer, block.path), partial(_sum, group))
    else:
        for unit in block.units:
            hook_call(at(layer, unit.path), partial(_sum, group))


def _sum(group: Group, call: Hook, *args: Any, **kwargs: Any) -> mx.array:
    return sum_over_ranks(call(*args, **kwargs), group)


def _divide_unit(module: nn.Module, unit: Unit, holding: Holding, rank: int, held: Held | None) -> None:
    if holding.is_empty:
        hook_call(module, partial(_give_nothing, module[unit.down].weight.shape[-2], unit.experts > 0))
    elif holding.division.pieces.role is Role.EXPERT:
        hook_call(module, OwnPairs(unit.experts, holding.numbers, rank, held))


def _give_nothing(width: int, is_stack: bool, call: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """Return zeros: the rank holds nothing of a unit."""
    of = args[0] if is_stack else x[..., 0]  # a stack has a result for each (token, expert) pair
    nothing = mx.zeros((*of.shape, width), x.dtype)
    return mx.depends([nothing], [x])[0]  # else its sum could overtake those before it


def _divide_heads(module: Any, path: str, heads: Heads, holding: Holding, holdings: Mapping[str, Holding]) -> None:
    mine = [found for name in heads.widths if (found := holdings.get(f"{path}.{name}")) is not None]
    kv = (other.span for other in mine if other.division.pieces.role is Role.KV_HEAD)
    narrow(module, holding.span, next(kv, holding.span))
