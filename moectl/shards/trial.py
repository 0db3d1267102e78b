"""Try on single modules of a skeleton whether they can be divided: in small, with random numbers for their matrices.

A unit passes where each part of the hidden dimension gives its own part of the down projection's input. A block passes
where the parts of two ranks add up to the whole. Heads pass where a rank's heads come out as they do among all. So
nothing that only looks like one of them is divided. No matrix of the model is computed, only what is between them.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from moectl.model.ownership import own
from moectl.model.regions import Role, Span
from moectl.shards.flow import TOKENS
from moectl.shards.hooks import Hook, hooked
from moectl.shards.skeleton import Skeleton
from moectl.shards.units import Block, Heads, LayerParts, Unit, at, divide_heads, find_strange_array, narrow

_TOLERANCE = 1e-4


class Indivisible(Exception):
    """A module is not what its names promise; says why."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What a module was called with, in the skeleton's pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def repeat(self, module: Any, experts: int = 0) -> Any:
        """Call a module with random numbers of the same shapes, always the same."""
        make = partial(_stand_in, experts=experts or 2)
        return module(*tree_map(make, list(self.args)), **tree_map(make, self.kwargs))


def try_parts(skeleton: Skeleton, parts: list[LayerParts]) -> dict[str, str]:
    """Try all units, blocks and heads; take away heads that cannot be divided.

    Says in `Block.sums` where sums belong, and returns the reason for each unit (by path) that cannot be divided.
    """
    calls = _record(skeleton, parts)
    reasons: dict[str, str] = {}
    for layer in parts:
        module = at(skeleton.model, layer.path)
        for block in layer.blocks:
            for unit in block.units:
                try:
                    _try_unit(at(module, unit.path), unit, calls.get(f"{layer.path}.{unit.path}"))
                except Indivisible as error:
                    reasons[f"{layer.path}.{unit.path}"] = str(error)
            if not any(f"{layer.path}.{unit.path}" in reasons for unit in block.units):
                block.sums = _place_sum(at(module, block.path), block, calls.get(f"{layer.path}.{block.path}"))
        layer.heads = [h for h in layer.heads if _pass_heads(at(module, h.path), h, calls.get(f"{layer.path}.{h.path}"))]
    return reasons


def _record(skeleton: Skeleton, parts: list[LayerParts]) -> dict[str, _Call]:
    """Note how each module is called in a forward pass of which nothing is computed."""
    calls: dict[str, _Call] = {}

    def hook(path: str, call: Hook, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(path, _Call(tuple(_copied(list(args))), _copied(kwargs)))
        return call(*args, **kwargs)

    paths = {
        f"{layer.path}.{part.path}"
        for layer in parts
        for part in (*layer.blocks, *layer.heads, *(unit for block in layer.blocks for unit in block.units))
    }
    with hooked((at(skeleton.model, path), partial(hook, path)) for path in sorted(paths)):
        skeleton.model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=make_prompt_cache(skeleton.model))
    return calls


def _try_unit(module: nn.Module, unit: Unit, call: _Call | None) -> None:
    """Try whether a unit is elementwise between its projections; find out how its up projections are laid out.

    Raises Indivisible.
    """
    if call is None:
        raise Indivisible("it is not called")
    if strange := find_strange_array(*(module[name] for name in (*unit.ups, unit.down))):
        raise Indivisible(f"moectl does not know what {strange} of its projections is")
    layouts = [(unit.segments, 1), (1, unit.segments)] if unit.segments > 1 else [(1, 1)]
    cut = max(1, unit.hidden // 3)
    for segments, width in layouts:
        candidate = replace(unit, segments=segments, width=width)
        whole, _ = _run_unit(module, candidate, call, (0, unit.hidden))
        pieces = [_run_unit(module, candidate, call, span)[0] for span in ((0, cut), (cut, unit.hidden))]
        if _are_close(mx.concatenate(pieces, axis=-1), whole):
            unit.segments, unit.width = segments, width
            return
    raise Indivisible("it computes across its hidden dimension")


def _run_unit(module: nn.Module, unit: Unit, call: _Call, span: Span) -> tuple[mx.array, mx.array]:
    """Return the input of the down projection for a span of the hidden dimension, and the unit's result."""
    seen: dict[str, mx.array] = {}

    def up(name: str, base: Hook, *args: Any, **kwargs: Any) -> mx.array:
        seen[name] = whole = _numbers(name, base(*args, **kwargs).shape)
        step, (start, stop) = unit.hidden * unit.width, (place * unit.width for place in span)
        return mx.concatenate([whole[..., s * step + start : s * step + stop] for s in range(unit.segments)], axis=-1)

    def down(base: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen["input"] = x
        return _numbers("down", (*x.shape[:-1], module[unit.down].weight.shape[-2]))

    hooks = [*((module[name], partial(up, name)) for name in unit.ups), (module[unit.down], down)]
    with _filled(module, [*unit.ups, unit.down]), hooked(hooks):
        try:
            result = call.repeat(module, unit.experts)
            mx.eval(result, seen["input"])
        except Exception as error:  # any code of a model file may run here
            raise Indivisible(f"it cannot be tried: {_line(error)}") from None
    if not all(name in seen for name in unit.ups):
        raise Indivisible("it does not use all of its projections")
    expected = _numbers("down", (*seen["input"].shape[:-1], result.shape[-1]))
    if result.size != expected.size or not _are_close(result.reshape(-1), expected.reshape(-1)):
        raise Indivisible("its result is not that of its down projection")
    return seen["input"], result


def _place_sum(module: nn.Module, block: Block, call: _Call | None) -> str:
    """Return where the sum over ranks belongs: in mlx-lm's block where it has one, after the block, or in the units."""
    owner = next((m for _, m in module.named_modules() if hasattr(m, "sharding_group")), None)
    if call is None:
        return "unit"
    try:
        whole, first, second = (_run_block(module, block, call, which) for which in ("both", "first", "second"))
        if owner is not None:
            return "own" if _are_close(_run_own_sum(module, owner, block, call), whole) else "unit"
        return "block" if _are_close(first + second, whole) else "unit"
    except Exception:  # any code of a model file may run here; a sum in each unit is right for all
        return "unit"


def _run_block(module: nn.Module, block: Block, call: _Call, which: str) -> mx.array:
    """Return a block's result for what the down projections of one of two ranks give, or of both."""
    count = iter(range(1 << 20))

    def up(name: str, base: Hook, *args: Any, **kwargs: Any) -> mx.array:
        return _numbers(name, base(*args, **kwargs).shape)

    def down(base: Hook, *args: Any, **kwargs: Any) -> mx.array:
        shape, number = base(*args, **kwargs).shape, next(count)
        first, second = _numbers(f"first {number}", shape), _numbers(f"second {number}", shape)
        return {"both": first + second, "first": first, "second": second}[which]

    base = len(block.path) + 1
    below = {unit.path[base:]: unit for unit in block.units}  # the block itself may be the unit
    hooks: list[tuple[Any, Hook]] = []
    for path, unit in below.items():
        inner = at(module, path)
        hooks += [*((inner[name], partial(up, f"{path} {name}")) for name in unit.ups), (inner[unit.down], down)]
    leave = [f"{path}.{name}".removeprefix(".") for path, unit in below.items() for name in (*unit.ups, unit.down)]
    experts = max(unit.experts for unit in block.units)
    with _filled(module, leave), hooked(hooks):
        result: mx.array = call.repeat(module, experts)
        mx.eval(result)
    return result


class _Pair:
    """Stands in for a group of two ranks."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return self._rank


def _run_own_sum(module: nn.Module, owner: Any, block: Block, call: _Call) -> mx.array:
    """Return what a block of mlx-lm that sums over ranks gives on the first of two ranks."""
    seen: list[mx.array] = []
    others: list[mx.array] = []

    def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
        seen.append(x)
        return x + others[len(seen) - 1] if others else x

    with ExitStack() as stack:
        stack.callback(setattr, owner, "sharding_group", None)
        stack.enter_context(_replaced_sum(all_sum))
        owner.sharding_group = _Pair(1)
        _run_block(module, block, call, "second")
        if len(seen) != 1:
            raise Indivisible(f"it sums {len(seen)} times")
        others, seen = seen, []
        owner.sharding_group = _Pair(0)
        return _run_block(module, block, call, "first")


@contextmanager
def _replaced_sum(all_sum: Callable[..., mx.array]) -> Iterator[None]:
    before = mx.distributed.all_sum
    mx.distributed.all_sum = all_sum
    try:
        yield
    finally:
        mx.distributed.all_sum = before


def _pass_heads(module: nn.Module, heads: Heads, call: _Call | None) -> bool:
    """Whether each rank's heads come out as they do among all: for two ranks, and for two to a KV head."""
    projections = [module[name] for name in heads.widths if not isinstance(module[name], mx.array)]
    if call is None or find_strange_array(*projections):
        return False
    divisions = divide_heads(module, heads)
    out, tried = heads.out, False
    try:
        whole = _run_heads(module, heads, call, None)
        for ranks in {2, 2 * heads.kv_count}:
            spans = {name: own(division.pieces, [1.0] * ranks) for name, division in divisions.items()}
            for rank in range(ranks) if spans[out] is not None else ():
                mine = {name: found[rank] for name, found in spans.items() if found is not None}
                start, stop = (place * divisions[out].width for place in mine[out])
                if not _are_close(_run_heads(module, heads, call, mine), whole[..., start:stop]):
                    return False
                tried = True
    except Exception:  # any code of a model file may run here; an attention that stays whole is right
        return False
    return tried


def _run_heads(module: nn.Module, heads: Heads, call: _Call, spans: dict[str, Span] | None) -> mx.array:
    """Return the input of an attention's last projection, for all heads or for a span of the pieces of each child."""
    divisions, out = divide_heads(module, heads), heads.out
    seen: dict[str, mx.array] = {}

    def project(path: str, base: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if path == out:
            seen["input"] = x
            return mx.zeros((*x.shape[:-1], module[out].weight.shape[-2]))
        whole = _numbers(path, base(x, *args, **kwargs).shape)
        if spans is None or path not in spans:
            return whole
        start, stop = (place * divisions[path].width for place in spans[path])
        return whole[..., start:stop]

    linears = [(path, m) for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)]
    with _filled(module, [path for path, _ in linears]):
        if spans is not None:
            kv_span = next((spans[n] for n, d in divisions.items() if d.pieces.role is Role.KV_HEAD), spans[out])
            for name in (name for name, division in divisions.items() if division.axis == 0):
                holder, key = (module, name) if isinstance(module[name], mx.array) else (module[name], "weight")
                holder[key] = holder[key][slice(*spans[name])]
            narrow(module, spans[out], kv_span)
        with hooked((m, partial(project, path)) for path, m in linears):
            mx.eval(call.repeat(module), seen["input"])
    return seen["input"]


@contextmanager
def _filled(module: nn.Module, without: list[str]) -> Iterator[None]:
    """Fill a module's parameters with random numbers, but not those below `without`; everything is undone at the end."""
    kept = [(inner, dict(inner), dict(inner.__dict__)) for _, inner in module.named_modules()]
    try:
        for path, inner in module.named_modules():
            if any(path == other or path.startswith(f"{other}.") for other in without):
                continue
            for name, value in list(inner.items()):
                if isinstance(value, mx.array) and not name.startswith("_") and mx.issubdtype(value.dtype, mx.floating):
                    inner[name] = _numbers(f"{path}.{name}", value.shape)
        yield
    finally:
        for inner, items, attributes in kept:
            inner.clear()
            dict.update(inner, items)
            inner.__dict__.clear()
            inner.__dict__.update(attributes)


def _numbers(name: str, shape: tuple[int, ...]) -> mx.array:
    """Return random numbers that depend on a name and a shape."""
    return 0.3 * mx.random.normal(shape, key=mx.random.key(zlib.crc32(name.encode()))) + 0.1


def _stand_in(value: Any, *, experts: int) -> Any:
    if not isinstance(value, mx.array):
        return copy.deepcopy(value)
    if mx.issubdtype(value.dtype, mx.floating):
        return _numbers("argument", value.shape)
    if value.dtype == mx.bool_:
        return mx.ones(value.shape, dtype=mx.bool_)
    return (mx.arange(value.size).reshape(value.shape) % experts).astype(value.dtype)


def _copied(value: Any) -> Any:
    """Return arguments as they are now: a cache changes during the call."""
    return tree_map(lambda leaf: leaf if isinstance(leaf, mx.array) else copy.deepcopy(leaf), value)


def _are_close(some: mx.array, others: mx.array) -> bool:
    if some.shape != others.shape:
        return False
    off = mx.abs(some - others).max().item()
    size = mx.abs(others).max().item()
    return bool(size > 0 and off <= _TOLERANCE * size)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
