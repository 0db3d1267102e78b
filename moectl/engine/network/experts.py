"""Multiply with stacked experts on a CPU: where many (token, expert) pairs meet few experts, expert by expert.

MLX gathers one matrix per pair there, and cannot do so in all types. Here the pairs of an expert become one dense
product in numpy, whose GEMM is some 40 times faster than MLX's Linux wheel. It takes the place of mlx-lm's stacks of
matrices in any family: activations, sums and the choice of experts stay the model's. On a GPU nothing is installed:
mlx-lm's sorted gather is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from moectl.shards.look.hooks import Hook, hook_call
from moectl.shards.look.units import SWITCHES

_Floats = np.ndarray[Any, np.dtype[np.float32]]
Times = Callable[[_Floats, int], _Floats]  # rows (T, in) and the number of an expert → (T, out)

# Fewer (token, expert) pairs than this are gathered one by one on the CPU; more are grouped by expert.
GROUP_FROM_PAIRS = 64
# Where a matrix has this many elements and is not quantised, two tokens are grouped already: reading it once, in numpy,
# costs less than the wait for the host (2 to 3 times a batch of 8's speed at 512 × 896; below this it is slower).
LARGE_ELEMENTS = 1 << 17


def computes_on_gpu() -> bool:
    """Return whether this process computes on a GPU. Tests let ranks on a CPU take its ways (`tests.support.metal`)."""
    return mx.default_device() != mx.Device(mx.cpu)


def install(model: nn.Module) -> None:
    """Let all stacks of experts below a module group their pairs; after they were quantised, before they are used."""
    if computes_on_gpu():
        return
    for module in model.modules():
        if isinstance(module, SWITCHES):
            hook_call(module, _run)


def waits_for_host(module: nn.Module, indices: mx.array) -> bool:
    """Return whether a call with these indices (…, K) evaluates its input before it returns; for stacks, or a unit."""
    stacks = (stack for stack in module.modules() if isinstance(stack, SWITCHES))
    return not computes_on_gpu() and any(_is_grouped(stack, indices) for stack in stacks)


def run_grouped(x: mx.array, indices: mx.array, out: int, times: Times) -> mx.array:
    """Return the products of all pairs, (…, 1, out) in x's dtype; it evaluates x and indices.

    x (…, 1, in) and indices (…) are broadcast, as MLX's gather does it.
    """
    chosen, rows = np.array(indices).astype(np.int64), to_numpy(x)
    batch = np.broadcast_shapes(rows.shape[:-2], chosen.shape)
    numbers = np.broadcast_to(np.arange(math.prod(rows.shape[:-2])).reshape(rows.shape[:-2]), batch).ravel()
    experts, rows = np.broadcast_to(chosen, batch).ravel(), rows.reshape(-1, rows.shape[-1])
    found = np.empty((experts.size, out), np.float32)
    is_sorted = experts.size == len(rows) and bool((experts[1:] >= experts[:-1]).all())
    order = np.arange(experts.size) if is_sorted else np.argsort(experts, kind="stable")
    ends = np.flatnonzero(np.diff(experts[order], append=-1)) + 1
    for start, stop in pairwise([0, *ends.tolist()]):
        expert = int(experts[order[start]])
        if is_sorted:  # as mlx-lm gives many: nothing has to be moved
            found[start:stop] = times(rows[start:stop], expert)
        else:
            pairs = order[start:stop]
            found[pairs] = times(rows[numbers[pairs]], expert)
    return mx.array(found.reshape(*batch, 1, out)).astype(x.dtype)


def times(rows: _Floats, stack: Any, expert: int) -> _Floats:
    """Return rows (T, in) times the transpose of one expert's matrix, dequantised for this use only, plus its bias."""
    part = slice(expert, expert + 1)  # an int index would copy the expert
    weight = stack.weight[part]
    if "scales" in stack:
        biases, factors = stack.get("biases"), stack.get("global_scale")
        weight = mx.dequantize(
            weight,
            stack.scales[part],
            None if biases is None else biases[part],
            group_size=stack.group_size,
            bits=stack.bits,
            mode=stack.mode,
            global_scale=None if factors is None else factors[expert],
        )
    found: _Floats = rows @ to_numpy(weight)[0].T
    if "bias" in stack:
        found += to_numpy(stack.bias[part])
    return found


def to_numpy(x: mx.array) -> _Floats:
    """Return an array in float32, without a copy where it is that already."""
    return np.asarray(x.astype(mx.float32))


def _run(call: Hook, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    stack: Any = call.args[0]  # type: ignore[attr-defined]
    if x.shape[-2] != 1 or not _is_grouped(stack, indices):
        result: mx.array = call(x, indices, sorted_indices=sorted_indices)
        return result
    return run_grouped(x, indices, stack.weight.shape[-2], lambda rows, expert: times(rows, stack, expert))


def _is_grouped(stack: Any, indices: mx.array) -> bool:
    if indices.size >= GROUP_FROM_PAIRS:
        return True
    if "scales" in stack:
        return stack.get("global_scale") is not None  # MLX's CPU gather_qmm knows all types, but no such scale
    is_large = math.prod(stack.weight.shape[1:]) >= LARGE_ELEMENTS
    return (is_large and indices.size > indices.shape[-1]) or stack.weight.dtype != mx.float32  # as its gather_mm wants
