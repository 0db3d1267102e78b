"""The peak of MLX's memory on one rank of a model, beside the planner's estimate: run as a program of its own.

`python -m tests.support.peak FAMILY SPLIT RANKS GROUP_SIZE SIZES TOKENS` prints both. The model has random weights, and
the family's small configuration with other sizes (JSON). The other ranks are not there: what they add is left out.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network import attention, exchange, experts
from moectl.engine.network.parallel import cut, divide
from moectl.engine.network.stages import keep, make_stage
from moectl.model.ownership import hold, own_layers
from moectl.model.placement import make_placement
from moectl.planner.memory import CPU_DTYPE_BYTES, Need, rank_need
from moectl.shards.look.flow import names_of_rank
from moectl.shards.look.outline import outline
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.units import divisions_of
from moectl.shards.look.ways import look
from tests.support.families import config_of, quantise

CHUNK = 512


class _Alone:
    """A group of which the other ranks say nothing."""

    def __init__(self, size: int) -> None:
        self._size = size

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size


def compare(
    family: str, split: str, ranks: int, group_size: int, sizes: dict[str, Any], tokens: int
) -> tuple[Need, int]:
    """Return what rank 0 is thought to need, and the peak of a prompt of some chunks and of a few tokens after it."""
    config = {**config_of(family), **sizes}
    skeleton = make_skeleton(config)
    found = look(skeleton)
    if group_size:
        quantise(skeleton.model, group_size)
    placement = make_placement(outline(skeleton, found, config), split, ranks)
    need = rank_need(placement, 0, context=tokens, dtype_bytes=CPU_DTYPE_BYTES)
    model, group, names = skeleton.model, _Alone(ranks), set(skeleton.parameters)
    if split == "layers":
        assert found.flow is not None
        spans = own_layers(len(model.layers), placement.shares)
        names = names_of_rank(skeleton, found.flow, spans[0], first=True, last=ranks == 1)
        keep(model, names)
        make_stage(model, found.flow, spans, 0, group)
    else:
        holdings = hold(divisions_of(model, found.parts, split), placement.shares, 0)
        cut(model, holdings)
        divide(model, found.parts, holdings, group)
    experts.install(model)
    attention.install(skeleton.layers)
    filled = [(name, _fill(array)) for name, array in tree_flatten(model.parameters()) if name in names]
    model.update(tree_unflatten(filled))
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    caches = make_prompt_cache(model)
    prompt = mx.zeros((1, tokens), dtype=mx.int32)
    for start in range(0, tokens, CHUNK):
        model(prompt[:, start : start + CHUNK], cache=caches)
        mx.eval([cache.state for cache in caches if not cache.empty()])
    return need, mx.get_peak_memory()


def _fill(array: mx.array) -> mx.array:
    filled = mx.random.normal(array.shape) if mx.issubdtype(array.dtype, mx.floating) else mx.full(array.shape, 7)
    filled = (
        (0.02 * filled).astype(array.dtype) if mx.issubdtype(array.dtype, mx.floating) else filled.astype(array.dtype)
    )
    mx.eval(filled)
    return filled


def main(family: str, split: str, ranks: str, group_size: str, sizes: str, tokens: str = "509") -> None:
    alone: Any = mx.distributed  # what the others would add is left out
    vars(exchange)["_backend_sum"] = lambda x, *, group: mx.abs(x)
    alone.all_gather = lambda x, *, group: mx.concatenate([x] * group.size())
    alone.send = lambda x, to, *, group: mx.abs(x)
    with exchange.seam():
        need, peak = compare(family, split, int(ranks), int(group_size), json.loads(sizes), int(tokens))
    running = need.weights + need.kv + need.activations + need.communication  # nothing is loaded here
    found = {"estimate": running, "peak": peak, "weights": need.weights, "kv": need.kv}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
