"""One small configuration per model file of mlx-lm, models of them with random weights, and runs on several ranks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.experts import install
from moectl.engine.network.load import load_rank
from moectl.engine.network.parallel import cut, divide
from moectl.engine.network.stages import keep, make_stage, remove_head
from moectl.model.manifest import read_manifest
from moectl.model.ownership import hold, own_layers
from moectl.shards.look.flow import names_of_rank
from moectl.shards.look.skeleton import Skeleton, find_classes, make_skeleton
from moectl.shards.look.units import divisions_of
from moectl.shards.look.ways import Findings, look
from tests.support.fake_group import run_ranks

PROMPT = [3, 11, 5, 7, 2, 9, 4, 8, 6, 1]
STEPS = 3
Change = Callable[[Any, int, Any], None]  # (model, rank, group)


@cache
def _configs() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parent.parent / "golden" / "families.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def families() -> list[str]:
    return list(_configs())


def config_of(family: str) -> dict[str, Any]:
    return copy.deepcopy(_configs()[family])


def make_whole(family: str, *, quantised: int | None = None) -> Any:
    """Build a model with random weights; what would be zero or one is random, too: it would hide mistakes.

    `quantised` is the size of its groups, with 4 bits.
    """
    mx.random.seed(7)
    config = config_of(family)
    model_class, args_class = find_classes(config)
    model = model_class(args_class.from_dict(config))
    noisy = [
        (name, (0.05 * mx.random.normal(array.shape) + array).astype(array.dtype))
        for name, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and (array.ndim == 1 or "bias" in name) and "A_log" not in name
    ]
    model.load_weights(noisy, strict=False)
    model.eval()
    if quantised is not None:
        quantise(model, quantised)
    mx.eval(model.parameters())
    return model


def quantise(model: nn.Module, group_size: int) -> None:
    nn.quantize(
        model,
        group_size,
        4,
        class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % group_size == 0,
    )


def run_greedily(
    model: Any,
    head: Callable[[mx.array], mx.array] = lambda logits: logits,
    *,
    prompt: Sequence[int] = PROMPT,
    steps: int = STEPS,
) -> list[mx.array]:
    """Return the logits of the last token of the prompt and of each step; `head` brings them from the rank with it."""
    caches = make_prompt_cache(model)
    tokens, found = mx.array([list(prompt)]), []
    for _ in range(steps):
        logits = head(model(tokens, cache=caches)[:, -1])
        mx.eval(logits, [c.state for c in caches if not c.empty()])
        found.append(logits)
        tokens = mx.argmax(logits, axis=-1)[:, None]
    return found


def look_at(family: str, *, quantised: int | None = None) -> tuple[Skeleton, Findings]:
    skeleton = make_skeleton(config_of(family))
    found = look(skeleton)
    if quantised is not None:
        quantise(skeleton.model, quantised)
    return skeleton, found


def run_split(
    family: str,
    found: tuple[Skeleton, Findings],
    split: str,
    shares: Sequence[float],
    *,
    quantised: int | None = None,
    change: Change = lambda model, rank, group: None,
) -> tuple[list[mx.array], list[int], int]:
    """Run a model on ranks; return logits, bytes of weights per rank, and sums of one rank.

    `change` may do something to a rank's model before it runs.
    """
    skeleton, _ = found
    vocabulary = skeleton.model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1]

    leader = len(shares) - 1 if split == "layers" else 0

    def run(rank: int, group: Any) -> tuple[list[mx.array], int, int]:
        model, names = make_rank(family, found, split, shares, rank, group, quantised=quantised)
        change(model, rank, group)
        held = sum(array.nbytes for name, array in tree_flatten(model.parameters()) if name in names)

        def head(logits: mx.array) -> mx.array:
            wide = logits if logits.shape[-1] == vocabulary else mx.zeros((1, vocabulary)) + logits * 0
            gathered: mx.array = group.gather(wide.astype(mx.float32)[None])
            return gathered[leader]

        return run_greedily(model, head), held, group.sums

    results = run_ranks(len(shares), run)
    return results[0][0], [held for _, held, _ in results], results[0][2]


def run_set(directory: Path, *, prompt: Sequence[int] = PROMPT, steps: int = STEPS) -> list[mx.array]:
    """Return the logits of a shard set's ranks."""
    manifest = read_manifest(directory)
    leader, size = manifest.placement.head_rank, manifest.structure.vocab_size

    def run(rank: int, group: Any) -> list[mx.array]:
        model = load_rank(directory, manifest, rank, group)

        def head(logits: mx.array) -> mx.array:
            wide = logits if rank == leader else mx.zeros((1, size)) + logits * 0
            gathered: mx.array = group.gather(wide.astype(mx.float32)[None])
            return gathered[leader]

        return run_greedily(model, head, prompt=prompt, steps=steps)

    return run_ranks(manifest.world_size, run)[leader]


def make_rank(
    family: str,
    found: tuple[Skeleton, Findings],
    split: str,
    shares: Sequence[float],
    rank: int,
    group: Any,
    *,
    quantised: int | None = None,
) -> tuple[Any, set[str]]:
    """Return one rank's model, and the names of the parameters that it needs."""
    skeleton, seen = found
    model = make_whole(family, quantised=quantised)
    if split == "layers":
        assert seen.flow is not None
        spans, leader = own_layers(len(model.layers), shares), len(shares) - 1
        names = names_of_rank(skeleton, seen.flow, spans[rank], first=rank == 0, last=rank == leader)
        keep(model, names)
        make_stage(model, seen.flow, spans, rank, group)
    else:
        names = set(skeleton.parameters)
        holdings = hold(divisions_of(model, seen.parts, split), shares, rank)
        cut(model, holdings)
        divide(model, seen.parts, holdings, group, rank=rank)
        if rank != 0 and seen.flow is not None:
            names = names_of_rank(skeleton, seen.flow, (0, len(model.layers)), first=True, last=False)
            keep(model, names)
            remove_head(model, seen.flow)
    install(model)
    return model, names


def is_equal(some: list[mx.array], others: list[mx.array], tolerance: float = 1e-4) -> tuple[bool, float]:
    """Whether logits are within a part of their size, with the same greedy tokens; and how far they are off."""
    off = max(_number(mx.abs(a - b).max() / mx.abs(b).max()) for a, b in zip(some, others, strict=True))
    same = all(mx.argmax(a).item() == mx.argmax(b).item() for a, b in zip(some, others, strict=True))
    return same and off <= tolerance, off


def _number(array: mx.array) -> float:
    return float(np.array(array))


def write_family(family: str, directory: Path) -> Path:
    """Write a family's model as a checkpoint, in the form in which mlx-lm saves one."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = dict(tree_flatten(make_whole(family).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config_of(family)), encoding="utf-8")
    return directory
