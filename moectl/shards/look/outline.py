"""Find the structure of a model in numbers: its skeleton is looked at, and nothing of it is computed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.errors import CheckpointError
from moectl.model.regions import Division, Pieces, Role
from moectl.model.structure import CacheSize, Layer, Outer, Part, Quantization, Structure
from moectl.shards.look.caches import can_batch, can_trim, list_parts
from moectl.shards.look.flow import TOKENS, Flow
from moectl.shards.look.hooks import Hook, hooked, uncompiled
from moectl.shards.look.skeleton import Skeleton, empty
from moectl.shards.look.trial import describe
from moectl.shards.look.units import LayerParts, divisions_of
from moectl.shards.look.ways import Findings
from moectl.shards.look.working import count_launches, find_moments

# Names under which configs say how many tokens a model was made for.
_CONTEXT = (
    "max_position_embeddings",
    "max_seq_len",
    "max_sequence_length",
    "n_positions",
    "n_ctx",
    "seq_length",
    "model_max_length",
)
_ENDLESS = 1 << 20  # tokens of a context that has no limit of its own
_USUAL_GROUP = 64


@dataclass(slots=True)
class _Seen:
    """What an unevaluated pass shows."""

    width: int = 0
    vocab_size: int = 0
    caches: tuple[Any, ...] = ()


def outline(skeleton: Skeleton, found: Findings, config: Mapping[str, Any]) -> Structure:
    """Return the structure of a model whose modules have the precision that they will have."""
    model = skeleton.model
    empty(model)  # what was quantised is not computed yet, and would be seen in graphs
    seen = _look_through(skeleton)
    units = {
        f"{layer.path}.{unit.path}": unit for layer in found.parts for block in layer.blocks for unit in block.units
    }
    hidden = divisions_of(model, found.parts, "hidden")
    divided = divisions_of(model, found.parts, "tensor")
    heads = {path: division for path, division in divided.items() if path not in hidden}
    is_quantisable = _make_predicate(model)
    paths = [f"{layer.path}." for layer in found.parts] or [
        f"{skeleton.paths[id(layer)]}." for layer in skeleton.layers
    ]
    by_layer: dict[str, defaultdict[Any, list[int]]] = {path: defaultdict(lambda: [0, 0]) for path in ("", *paths)}
    for name, values, floats, quantization in _count(model, is_quantisable):
        prefix = next((path for path in paths if name.startswith(path)), "")
        unit = next((unit for path, unit in units.items() if name.startswith(f"{path}.")), None)
        division = hidden.get(name)
        own_heads = _pieces(heads.get(name))
        key: tuple[Any, ...] = quantization, _pieces(division), own_heads
        if division is not None and unit is not None:
            key += (unit.experts, unit.top_k, unit.owns_pairs)
        if not prefix:
            key = quantization, name
        counts = by_layer[prefix][key]
        counts[0] += values
        counts[1] += floats
    layers = [
        Layer(
            tuple(Part(values, floats, *key) for key, (values, floats) in by_layer[path].items()),
            _size_caches(seen.caches, found, number, heads),
            *_count_sums(found.parts[number] if found.parts else None),
        )
        for number, path in enumerate(paths)
    ]
    kinds = tuple(dict.fromkeys(layers))
    order = tuple(kinds.index(layer) for layer in layers)
    launches = count_launches(skeleton, order)
    kinds = tuple(replace(kind, launches=count) for kind, count in zip(kinds, launches, strict=True))
    return Structure(
        skeleton.model_type,
        kinds,
        order,
        tuple(_outer(found.flow, by_layer[""])),
        seen.width,
        seen.vocab_size,
        find_context(config),
        find_moments(skeleton, order, divided, on_gpu=False),
        find_moments(skeleton, order, divided, on_gpu=True),
        {split: reason for split, reason in found.ways.items() if reason is not None},
        has_line=found.flow is not None,
        can_trim=can_trim(seen.caches),
        can_batch=can_batch(skeleton),
    )


def find_context(config: Mapping[str, Any]) -> int:
    """Return how many tokens a model was made for, by its config.json."""
    for table in (config, config.get("text_config") or {}):
        for key in _CONTEXT:
            if isinstance(value := table.get(key), int) and value > 0:
                return value
    return _ENDLESS


def _look_through(skeleton: Skeleton) -> _Seen:
    """Run two tokens through a skeleton, in bfloat16; nothing of it is computed."""
    seen, before = _Seen(caches=tuple(make_prompt_cache(skeleton.model))), skeleton.parameters

    def note(call: Hook, *args: Any, **kwargs: Any) -> Any:
        state = next(value for value in (*args, *kwargs.values()) if isinstance(value, mx.array))
        seen.width = state.shape[-1]
        return call(*args, **kwargs)

    floats = [(name, array) for name, array in before.items() if array.dtype == mx.float32]
    try:
        skeleton.model.update(tree_unflatten([(name, array.astype(mx.bfloat16)) for name, array in floats]))
        with uncompiled(), hooked([(skeleton.layers[0], note)]):
            logits = skeleton.model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=list(seen.caches))
        seen.vocab_size = logits.shape[-1]
    except Exception as error:  # any code of a model file runs here
        raise CheckpointError(
            f"a {skeleton.model_type} model cannot run as config.json describes it: {describe(error)}",
            hint="compare config.json with the one of the original repository",
        ) from error
    finally:
        skeleton.model.update(tree_unflatten(floats))
    return seen


def _count(
    model: nn.Module, is_quantisable: Callable[[str, nn.Module], bool]
) -> Iterator[tuple[str, int, int, Quantization | None]]:
    """Yield (path, values, floats, how the values are quantised) of each module or array with parameters."""
    for path, module in model.named_modules():
        own = {name: value for name, value in module.items() if isinstance(value, mx.array) and name[:1] != "_"}
        if not own:
            continue
        if "scales" in own:
            values = own["weight"].size * 32 // module.bits
            floats = own["bias"].size if "bias" in own else 0
            yield path, values, floats, Quantization(module.bits, module.group_size, getattr(module, "mode", "affine"))
        elif is_quantisable(path, module):
            values = own.pop("weight").size
            yield path, values, sum(array.size for array in own.values()), None
        else:
            for name, array in own.items():
                yield (path if name in ("weight", "bias") else f"{path}.{name}"), 0, array.size, None


def _make_predicate(model: Any) -> Callable[[str, nn.Module], bool]:
    chosen: Callable[[str, nn.Module], Any] = getattr(model, "quant_predicate", None) or (lambda *_: True)

    def is_quantisable(path: str, module: nn.Module) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % _USUAL_GROUP == 0
        return fits and bool(chosen(path, module))

    return is_quantisable


def _pieces(division: Division | None) -> Pieces | None:
    return None if division is None else division.pieces


def _count_sums(layer: LayerParts | None) -> tuple[int, int]:
    if layer is None:
        return 0, 0
    return sum(len(b.units) if b.sums == "unit" else 1 for b in layer.blocks), len(layer.heads)


def _size_caches(
    caches: tuple[Any, ...], found: Findings, number: int, heads: Mapping[str, Division]
) -> tuple[CacheSize, ...]:
    owner = found.flow.caches[number] if found.flow is not None else number if number < len(caches) else None
    if owner is None:
        return ()
    prefix = f"{found.parts[number].path}." if found.parts else "-"
    kv = [d.pieces for path, d in heads.items() if path.startswith(prefix) and d.pieces.role is Role.KV_HEAD]
    return tuple(_size_cache(part, kv[0] if kv else None) for part in list_parts(caches[owner]))


def _size_cache(cache: Any, heads: Pieces | None) -> CacheSize:
    if isinstance(keys := getattr(cache, "keys", None), mx.array):
        arrays = [array for array in (keys, cache.values) if isinstance(array, mx.array)]
        each = sum(array.size // array.shape[2] for array in arrays)
        limit = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        divides = heads is not None and keys.shape[1] == heads.count
        return CacheSize(each, 0, limit, heads if divides else None)
    state = [array for _, array in tree_flatten(getattr(cache, "cache", [])) if isinstance(array, mx.array)]
    wide = [array for array in state if array.dtype == mx.float32]  # the pass computes in bfloat16
    floats = sum(math.prod(array.shape) for array in wide)
    return CacheSize(fixed=sum(math.prod(array.shape) for array in state) - floats, floats=floats)


def _outer(flow: Flow | None, counted: Mapping[Any, list[int]]) -> Iterator[Outer]:
    for (quantization, path), (values, floats) in counted.items():
        part = Part(values, floats, quantization)
        if flow is None or path in flow.everywhere or path not in flow.before | flow.after:
            yield Outer(part)
        else:
            yield Outer(part, first=path in flow.before, last=path in flow.after)
