"""In which ways a model can be split, and why not in the others: found by looking at its skeleton."""

from __future__ import annotations

from dataclasses import dataclass

from moectl.errors import PlanError
from moectl.model.placement import SPLITS
from moectl.shards.look.exceptions import REFUSED
from moectl.shards.look.flow import Flow, NoPipeline, follow
from moectl.shards.look.hooks import uncompiled
from moectl.shards.look.skeleton import Skeleton, unchanged
from moectl.shards.look.trial import count_chosen, describe, record_calls, try_parts
from moectl.shards.look.units import LayerParts, at, find_parts


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found in a skeleton: all that a split needs to know."""

    parts: list[LayerParts]
    flow: Flow | None
    ways: dict[str, str | None]  # split → why it cannot be; None: it can


def look(skeleton: Skeleton) -> Findings:
    """Find out what of a model can be divided, and in which ways."""
    if (reason := REFUSED.get(skeleton.model_type)) is not None:
        return Findings([], None, dict.fromkeys(SPLITS, reason))
    with uncompiled(), unchanged(skeleton.model):
        return _look(skeleton)


def _look(skeleton: Skeleton) -> Findings:
    parts = find_parts(skeleton)
    try:
        calls = record_calls(skeleton, parts)
    except Exception as error:  # any code of a model file runs here; some wants a GPU of Apple's
        return Findings(parts, None, dict.fromkeys(SPLITS, f"it cannot run on this machine: {describe(error)}"))
    whole = try_parts(skeleton, parts, calls)
    count_chosen(parts, calls)
    units = [unit for layer in parts for block in layer.blocks for unit in block.units]
    heads = [found for layer in parts for found in layer.heads]
    ways: dict[str, str | None] = dict.fromkeys(SPLITS)
    if not units:
        reason = "it has no experts or MLP that moectl knows how to divide"
        ways |= dict.fromkeys(("experts", "hidden", "tensor"), reason)
    elif _share_modules(skeleton, parts):
        ways |= dict.fromkeys(("experts", "hidden", "tensor"), "several layers share an MLP or an attention")
    elif whole:
        path, reason = next(iter(whole.items()))
        ways |= dict.fromkeys(("experts", "hidden", "tensor"), f"{path} cannot be divided: {reason}")
    else:
        if not any(unit.owns_pairs for unit in units):
            ways["experts"] = "it has no stacked experts"
        if not heads:
            ways["tensor"] = "it has no attention whose heads moectl knows how to divide"
    flow = None
    try:
        flow = follow(skeleton)
    except NoPipeline as error:
        ways["layers"] = str(error)
    except Exception as error:  # any code of a model file runs here, with caches that it may not expect
        ways["layers"] = f"its layers cannot be followed: {describe(error)}"
    if len(skeleton.layers) < 2:
        ways["layers"] = "it has one layer"
    return Findings(parts, flow, ways)


def _share_modules(skeleton: Skeleton, parts: list[LayerParts]) -> bool:
    paths: list[str] = []
    for layer in parts:
        paths += [f"{layer.path}.{heads.path}" for heads in layer.heads]
        paths += [f"{layer.path}.{unit.path}" for block in layer.blocks for unit in block.units]
    return len({id(at(skeleton.model, path)) for path in paths}) < len(paths)


def ways(skeleton: Skeleton) -> dict[str, str | None]:
    """Return for each split why the model cannot be split so; None where it can."""
    return look(skeleton).ways


def require(skeleton: Skeleton, found: Findings, split: str) -> None:
    """Raise PlanError where a model cannot be split in this way, with the ways that work."""
    reason = found.ways[split]
    if reason is None:
        return
    able = [name for name in SPLITS if found.ways[name] is None]
    raise PlanError(
        f"a {skeleton.model_type} model cannot be split by {split}: {reason}",
        hint=f"use --split {' or --split '.join(able)}" if able else "it runs on one host only",
    )
