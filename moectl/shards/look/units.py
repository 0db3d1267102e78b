"""What of a model can be divided, by the names of its modules; `moectl.shards.look.trial` tries whether that holds.

A *unit* has up projections and one down projection: all experts of a layer, or one dense MLP. In between everything is
elementwise in the hidden dimension, so that a rank with a span of it computes a part of the down projection's sum. A
*block* is what a layer calls by name; where it is linear in the results of its units, one sum per block is enough.
*Heads* are an attention whose heads can be divided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from moectl.model.regions import Division, Pieces, Role, Span
from moectl.shards.look.skeleton import Skeleton

# Up projections, and the down projection.
_PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "v1"), "w2"),
    (("w1", "w3"), "w2"),
    (("w1", "w2"), "c_proj"),
    (("c_fc_0", "c_fc_1"), "c_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("proj_1",), "proj_2"),
    (("input_linear",), "output_linear"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("key",), "value"),
)
_HEADS = ("n_heads", "num_heads", "num_attention_heads")
_KV_HEADS = ("n_kv_heads", "num_kv_heads", "num_key_value_heads")
_REPEATS = ("repeats", "num_key_value_groups", "n_kv_groups")  # query heads for each key and value
_OUTS = ("o_proj", "out_proj")
_ARRAYS = {"weight", "scales", "biases", "bias", "global_scale"}  # of a projection
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(slots=True)
class Unit:
    """Paths count from the layer."""

    path: str
    ups: tuple[str, ...]
    down: str
    hidden: int
    segments: int  # matrices in one up projection, one after the other,
    width: int  # or row by row in turns
    experts: int  # in a stack; 0: it is no stack
    owns_pairs: bool  # a call with the (token, expert) pairs of some experts gives these experts' results
    top_k: int = 0  # experts of a stack that a token goes to


@dataclass(slots=True)
class Block:
    path: str
    units: list[Unit] = field(default_factory=list)
    sums: str = "block"  # where the sum over ranks belongs: "block", "own" (mlx-lm's block does it), or "unit"


@dataclass(slots=True)
class Heads:
    """An attention: its projections, and its arrays with one number per head."""

    path: str
    count: int
    kv_count: int
    out: str  # the last projection
    widths: dict[str, tuple[Role, int, int]]  # child → what its pieces are, axis, elements of one


@dataclass(slots=True)
class LayerParts:
    path: str
    blocks: list[Block]
    heads: list[Heads]


def at(module: Any, path: str) -> Any:
    """Return what is at a path below a module."""
    for key in path.split(".") if path else ():
        module = module[int(key)] if isinstance(module, list) else module[key]
    return module


def find_parts(skeleton: Skeleton) -> list[LayerParts]:
    """Return units in their blocks, and heads, for each layer, as their names promise."""
    paths = skeleton.paths
    return [LayerParts(paths[id(layer)], _find_blocks(layer), list(_find_heads(layer))) for layer in skeleton.layers]


def divisions_of(model: nn.Module, parts: list[LayerParts], split: str) -> dict[str, Division]:
    """Return a division for the path of each module (or array) that `hidden`, `experts` or `tensor` divides.

    A quantised module is divided between its groups.
    """
    found: dict[str, Division] = {}
    for layer in parts:
        for unit in (unit for block in layer.blocks for unit in block.units):
            base = f"{layer.path}.{unit.path}"
            module = at(model, base)
            for name, division in divide_unit(module, unit, split).items():
                found[f"{base}.{name}"] = division
        if split == "tensor":
            for heads in layer.heads:
                module = at(model, f"{layer.path}.{heads.path}")
                for name, division in divide_heads(module, heads).items():
                    found[f"{layer.path}.{heads.path}.{name}"] = division
    return found


def divide_unit(module: nn.Module, unit: Unit, split: str) -> dict[str, Division]:
    """Return the divisions of a unit's children."""
    if split == "experts" and unit.owns_pairs:
        pieces = Pieces(Role.EXPERT, unit.experts)
        return {name: Division(0, pieces) for name in (*unit.ups, unit.down)}
    pieces = Pieces(Role.HIDDEN, unit.hidden, getattr(module[unit.down], "group_size", 1))
    up = Division(-2, pieces, unit.width, unit.segments)
    return {**dict.fromkeys(unit.ups, up), unit.down: Division(-1, pieces)}


def divide_heads(module: nn.Module, heads: Heads) -> dict[str, Division]:
    """Return the divisions of an attention's children."""
    group, width = getattr(module[heads.out], "group_size", 1), heads.widths[heads.out][2]
    grain = group // math.gcd(group, width)  # a matrix is quantised along its columns
    counts = {Role.HEAD: heads.count, Role.KV_HEAD: heads.kv_count}
    return {
        name: Division(axis, Pieces(role, counts[role], grain, heads.count, heads.kv_count), width)
        for name, (role, axis, width) in heads.widths.items()
    }


def narrow(module: Any, span: Span, kv_span: Span) -> None:
    """Tell an attention how many heads it has."""
    for names, (start, stop) in ((_HEADS, span), (_KV_HEADS, kv_span)):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, stop - start)
    for name in _REPEATS:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, (span[1] - span[0]) // max(1, kv_span[1] - kv_span[0]))


def _find_blocks(layer: nn.Module) -> list[Block]:
    blocks: dict[str, Block] = {}
    for path, module in layer.named_modules():
        unit = _read_unit(path, module) if path else None
        if unit is None or any(path.startswith(f"{other.path}.") for block in blocks.values() for other in block.units):
            continue
        first, *rest = path.split(".")
        name = f"{first}.{rest[0]}" if isinstance(layer[first], list) else first
        blocks.setdefault(name, Block(name)).units.append(unit)
    return list(blocks.values())


def is_unit(module: nn.Module) -> bool:
    """Whether a module has the projections of a unit."""
    return _match(module) is not None


def _match(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    for ups, down in _PATTERNS:
        if all(isinstance(module.get(name), nn.Module) and "weight" in module[name] for name in (*ups, down)):
            return ups, down
    return None


def _read_unit(path: str, module: nn.Module) -> Unit | None:
    if (found := _match(module)) is None:
        return None
    ups, down = found
    lower = module[down]
    hidden = dims(lower)[1]
    rows = [dims(module[name])[0] for name in ups]
    if len(set(rows)) > 1 or rows[0] % hidden:
        return None
    stacked = isinstance(lower, SWITCHES)
    owns = stacked and type(module).__call__ in (SwitchGLU.__call__, SwitchMLP.__call__)
    return Unit(path, ups, down, hidden, rows[0] // hidden, 1, lower.weight.shape[0] if stacked else 0, owns)


def dims(linear: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a linear layer or of each in a stack, quantised or not."""
    out, columns = linear.weight.shape[-2:]
    return out, columns * 32 // linear.bits if "scales" in linear else columns


def _find_heads(layer: nn.Module) -> Iterator[Heads]:
    for path, module in layer.named_modules():
        count, out = _number(module, _HEADS), next((name for name in _OUTS if name in module), None)
        if not path or not count or out is None:
            continue
        if "embed_q" in module or "kv_b_proj" in module:  # latent attention: a key and a value for each head
            kv_count = count
        elif "q_proj" in module and "k_proj" in module:
            kv_count = _number(module, _KV_HEADS) or 0
        else:
            continue
        if not kv_count or count % kv_count or dims(module[out])[1] % count:
            continue
        yield Heads(path, count, kv_count, out, _find_widths(module, count, kv_count, out))


def _find_widths(module: nn.Module, count: int, kv_count: int, out: str) -> dict[str, tuple[Role, int, int]]:
    by_role = {
        Role.HEAD: ("q_b_proj", "q_proj", "kv_b_proj", "g_proj", "gate_proj"),
        Role.KV_HEAD: ("k_proj", "v_proj"),
    }
    widths: dict[str, tuple[Role, int, int]] = {}
    for role, names in by_role.items():
        pieces = count if role is Role.HEAD else kv_count
        for name in names:
            if name in module and "weight" in module[name] and dims(module[name])[0] % pieces == 0:
                widths[name] = (role, -2, dims(module[name])[0] // pieces)
    vectors = [name for name, value in module.items() if isinstance(value, mx.array) and value.shape == (count,)]
    for name in ("embed_q", "unembed_out", *vectors):
        if name in module and not name.startswith("_"):
            widths[name] = (Role.HEAD, 0, 1)
    widths[out] = (Role.HEAD, -1, dims(module[out])[1] // count)
    return widths


def find_strange_array(*projections: nn.Module) -> str | None:
    """Return the name of an array of a projection of which nothing says how it is divided."""
    arrays = (name for projection in projections for name, value in projection.items() if isinstance(value, mx.array))
    return next((name for name in arrays if name not in _ARRAYS), None)


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)
