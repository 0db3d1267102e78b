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
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import _BaseCache, make_prompt_cache

from moectl.model.ownership import own
from moectl.model.regions import Role, Span
from moectl.shards.look.flow import TOKENS
from moectl.shards.look.hooks import Hook, hooked, replaced_sum
from moectl.shards.look.skeleton import Skeleton, unchanged
from moectl.shards.look.units import Block, Heads, LayerParts, Unit, at, divide_heads, find_strange_array, narrow

T = TypeVar("T")
_TOLERANCE = 1e-4


class Indivisible(Exception):
    """A module is not what its names promise; says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a module was called with, in the skeleton's pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def repeat(self, module: Any, experts: int = 0) -> Any:
        """Call a module with random numbers of the same shapes, always the same."""
        make = partial(_stand_in, experts=experts or 2)
        return module(*tree_map(make, list(self.args)), **tree_map(make, self.kwargs))


def try_parts(skeleton: Skeleton, parts: list[LayerParts], calls: dict[str, Call]) -> dict[str, str]:
    """Try all units, blocks and heads, with what they were called with; take away heads that cannot be divided.

    Says in `Block.sums` where sums belong, and returns the reason for each unit (by path) that cannot be divided.
    """
    known: dict[Any, Any] = {}
    # Experts that are no stack are not all called.
    usual = {type(at(skeleton.model, path)): call for path, call in calls.items()}

    def once(what: Callable[..., T], layer: LayerParts, part: Any) -> T:
        """Try one of several modules that are alike."""
        module = at(skeleton.model, f"{layer.path}.{part.path}")
        call = calls.get(f"{layer.path}.{part.path}") or usual.get(type(module))
        key = what, _likeness(module), _likeness(call)
        if key not in known:
            known[key] = what(module, part, call)
        found: T = known[key]
        return found

    reasons: dict[str, str] = {}
    shared = False
    for layer in parts:
        for block in layer.blocks:
            whole = len(reasons)
            for unit in block.units:
                reason, unit.segments, unit.width = once(_try_unit, layer, unit)
                if reason is not None:
                    reasons[f"{layer.path}.{unit.path}"] = reason
            if len(reasons) == whole:
                block.sums = once(_place_sum, layer, block)
        found = [(heads, once(_try_heads, layer, heads)) for heads in layer.heads]
        layer.heads = [heads for heads, result in found if result is not None]
        shared |= any(result == "shares" for _, result in found)
    if shared and not all(layer.heads for layer in parts):
        for layer in parts:  # an attention that is whole would take keys of one that is divided
            layer.heads = []
    return reasons


def _likeness(value: Any) -> Any:
    """Return what modules (or arguments) that compute alike have in common: all but the numbers in their arrays."""
    if isinstance(value, nn.Module):
        return type(value), _likeness(dict(value)), _likeness(value.__dict__)
    if isinstance(value, Call):
        return _likeness([value.args, value.kwargs])
    if isinstance(value, mx.array):
        return value.shape, value.dtype.size
    if isinstance(value, dict):
        return tuple((key, _likeness(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(_likeness(inner) for inner in value)
    if isinstance(value, set):
        return tuple(sorted(map(str, value)))
    if isinstance(value, str | int | float | type(None)):
        return type(value), value
    return type(value) if isinstance(value, _BaseCache) else id(value)


def record_calls(skeleton: Skeleton, parts: list[LayerParts]) -> dict[str, Call]:
    """Note how each module is called in a forward pass of which nothing is computed."""
    calls: dict[str, Call] = {}

    def hook(path: str, call: Hook, *args: Any, **kwargs: Any) -> Any:
        calls.setdefault(path, Call(tuple(_copied(list(args))), _copied(kwargs)))
        return call(*args, **kwargs)

    paths = {f"{layer.path}.{path}" for layer in parts for path in _paths_of(layer)}
    with hooked((at(skeleton.model, path), partial(hook, path)) for path in sorted(paths)):
        skeleton.model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=make_prompt_cache(skeleton.model))
    return calls


def count_chosen(parts: list[LayerParts], calls: dict[str, Call]) -> None:
    """Note in each stack how many experts a token goes to."""
    for layer in parts:
        for unit in (unit for block in layer.blocks for unit in block.units):
            call = calls.get(f"{layer.path}.{unit.path}")
            if unit.experts and call is not None and len(call.args) > 1:
                unit.top_k = call.args[1].shape[-1]


def _paths_of(layer: LayerParts) -> list[str]:
    units = [unit.path for block in layer.blocks for unit in block.units]
    return [*units, *(block.path for block in layer.blocks), *(heads.path for heads in layer.heads)]


def _try_unit(module: nn.Module, unit: Unit, call: Call | None) -> tuple[str | None, int, int]:
    """Return why a unit cannot be divided, if so; and how its up projections are laid out: segments and width."""
    if call is None:
        return "it is not called", 1, 1
    if strange := find_strange_array(*(module[name] for name in (*unit.ups, unit.down))):
        return f"moectl does not know what {strange} of its projections is", 1, 1
    cut = max(1, unit.hidden // 3)
    try:
        for segments, width in {(unit.segments, 1), (1, unit.segments)}:
            candidate = replace(unit, segments=segments, width=width)
            whole = _run_unit(module, candidate, call, (0, unit.hidden))
            pieces = [_run_unit(module, candidate, call, span) for span in ((0, cut), (cut, unit.hidden))]
            if _are_close(mx.concatenate(pieces, axis=-1), whole):
                return None, segments, width
    except Indivisible as error:
        return str(error), 1, 1
    return "it computes across its hidden dimension", 1, 1


def _run_unit(module: nn.Module, unit: Unit, call: Call, span: Span) -> mx.array:
    """Return the input of the down projection for a span of the hidden dimension. Raises Indivisible."""
    seen: dict[str, mx.array] = {}

    def up(name: str, base: Hook, *args: Any, **kwargs: Any) -> mx.array:
        seen[name] = whole = _numbers(name, base(*args, **kwargs).shape)
        step, (start, stop) = unit.hidden * unit.width, (place * unit.width for place in span)
        return mx.concatenate([whole[..., s * step + start : s * step + stop] for s in range(unit.segments)], axis=-1)

    def down(base: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        seen["input"] = x
        return _numbers("down", (*x.shape[:-1], module[unit.down].weight.shape[-2]))

    hooks: list[tuple[Any, Hook]] = [(module[name], partial(up, name)) for name in unit.ups]
    hooks.append((module[unit.down], down))
    with _filled(module, [*unit.ups, unit.down]), hooked(hooks):
        try:
            result = call.repeat(module, unit.experts)
            mx.eval(result, seen["input"])
        except Exception as error:  # any code of a model file may run here
            raise Indivisible(f"it cannot be tried: {describe(error)}") from None
    if not all(name in seen for name in unit.ups):
        raise Indivisible("it does not use all of its projections")
    expected = _numbers("down", (*seen["input"].shape[:-1], result.shape[-1]))
    if result.size != expected.size or not _are_close(result.reshape(-1), expected.reshape(-1)):
        raise Indivisible("its result is not that of its down projection")
    return seen["input"]


def _place_sum(module: nn.Module, block: Block, call: Call | None) -> str:
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


def _run_block(module: nn.Module, block: Block, call: Call, which: str) -> mx.array:
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


def _run_own_sum(module: nn.Module, owner: Any, block: Block, call: Call) -> mx.array:
    """Return what a block of mlx-lm that sums over ranks gives on the first of two ranks."""
    seen: list[mx.array] = []
    others: list[mx.array] = []

    def all_sum(x: mx.array, *, group: Any = None, stream: Any = None) -> mx.array:
        seen.append(x)
        return x + others[len(seen) - 1] if others else x

    with ExitStack() as stack:
        stack.callback(setattr, owner, "sharding_group", None)
        stack.enter_context(replaced_sum(all_sum))
        owner.sharding_group = _Pair(1)
        _run_block(module, block, call, "second")
        if len(seen) != 1:
            raise Indivisible(f"it sums {len(seen)} times")
        others, seen = seen, []
        owner.sharding_group = _Pair(0)
        return _run_block(module, block, call, "first")


def _try_heads(module: nn.Module, heads: Heads, call: Call | None) -> str | None:
    """Return None where heads cannot be divided; "shares" where the attention gives other layers its keys, too.

    Each rank's heads have to come out as they do among all: for two ranks, and for two to a KV head.
    """
    projections = [module[name] for name in heads.widths if not isinstance(module[name], mx.array)]
    if call is None or find_strange_array(*projections):
        return None
    divisions, out, result = divide_heads(module, heads), heads.out, None
    try:
        whole, gives_more = _run_heads(module, heads, call, None)
        for ranks in {2, 2 * heads.kv_count}:
            spans = {name: own(division.pieces, [1.0] * ranks) for name, division in divisions.items()}
            for rank in range(ranks) if spans[out] is not None else ():
                mine = {name: found[rank] for name, found in spans.items() if found is not None}
                start, stop = (place * divisions[out].width for place in mine[out])
                if not _are_close(_run_heads(module, heads, call, mine)[0], whole[..., start:stop]):
                    return None
                result = "shares" if gives_more else "divides"
    except Exception:  # any code of a model file may run here; an attention that stays whole is right
        return None
    return result


def _run_heads(module: nn.Module, heads: Heads, call: Call, spans: dict[str, Span] | None) -> tuple[mx.array, bool]:
    """Return the input of the last projection, and whether the attention gives more than its result.

    For all heads, or for a span of the pieces of each child.
    """
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
            result = call.repeat(module)
            mx.eval(result, seen["input"])
    return seen["input"], not isinstance(result, mx.array)


@contextmanager
def _filled(module: nn.Module, without: list[str]) -> Iterator[None]:
    """Fill a module's parameters with random numbers, but not those below `without`; at the end undo everything."""
    with unchanged(module):
        for path, inner in module.named_modules():
            if any(path == other or path.startswith(f"{other}.") for other in without):
                continue
            for name, value in list(inner.items()):
                if isinstance(value, mx.array) and not name.startswith("_") and mx.issubdtype(value.dtype, mx.floating):
                    inner[name] = _numbers(f"{path}.{name}", value.shape)
        yield


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
    size = mx.abs(others).max()
    return bool(mx.logical_and(size > 0, mx.abs(some - others).max() <= _TOLERANCE * size).item())


def describe(error: Exception) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
