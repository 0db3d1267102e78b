"""MLX's own graph of a pass that was not computed: its arrays, and its operations in the order in which MLX runs them.

On a CPU, stacked experts and attention work outside MLX (`engine.network`): what they need is run for them first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

STACKS = {"GatherMM", "GatherQMM"}
ATTENTION = "ArcTan2"  # the name of what stands for an attention on a CPU: no model uses it
OUTSIDE = {*STACKS, ATTENTION}  # on a CPU, numpy does that when all that it needs has run (`engine.network`)
_WIDTH = 20  # of MLX's search, where nothing else is set


@dataclass(frozen=True, slots=True)
class Primitive:
    """One operation of MLX, with the names of the arrays that it reads and makes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(slots=True)
class PassGraph:
    """A pass: the shape and the bytes of each array, and the operations in the order in which they run."""

    shapes: dict[str, tuple[int, ...]]
    bytes: dict[str, int]
    operations: list[Primitive]
    parameters: dict[str, str]  # name in the graph → path of a divided array
    given: set[str]  # arrays that are there before and after: parameters, the prompt, numbers
    outputs: list[str]  # of caches


def make_graph(told: list[dict[str, Any]], divided: list[str], *, waits: bool) -> PassGraph:
    """Return the graph of what `mx.export_function` has told.

    Its inputs are the prompt and the arrays with the paths `divided`. `waits`: whether stacked experts and attention
    wait for what they need, as on a CPU.
    """
    graph = PassGraph({}, {}, [], {}, set(), [])

    def note(arrays: list[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[str, ...]:
        for name, shape, dtype in arrays:
            graph.shapes[name], graph.bytes[name] = shape, math.prod(shape) * dtype.size
        return tuple(name for name, _, _ in arrays)

    for one in told:
        match one["type"]:
            case "inputs":
                given = note(one["inputs"])
                graph.given |= {*given}
                graph.parameters = dict(zip(given[1:], divided, strict=True))
            case "outputs":
                graph.outputs = list(note(one["outputs"]))
            case "constants":
                for name, array in one["constants"]:
                    graph.given |= set(note([(name, array.shape, array.dtype)]))
            case "primitive":
                inputs, outputs = note(one["inputs"]), note(one["outputs"])
                graph.operations.append(Primitive(one["name"], inputs, outputs))
    graph.operations = _put_in_order(graph, waits=waits)
    return graph


def _put_in_order(graph: PassGraph, *, waits: bool) -> list[Primitive]:
    """Return the operations as MLX runs them: what each work outside MLX asks for, and then what the caches need."""
    asked, done = _run_for(graph.operations, graph.outputs, set()), set[int]()
    if not waits:
        return asked
    order: list[Primitive] = []
    for operation in asked:
        if operation.name in OUTSIDE:
            order += _run_for(graph.operations, operation.inputs, done)
            order.append(operation)
            done |= {id(o) for o in order}
    return order + _run_for(graph.operations, graph.outputs, done)


def _run_for(operations: Sequence[Primitive], outputs: Sequence[str], done: Set[int]) -> list[Primitive]:
    """Return in order what is not done of all that these outputs need: breadth first (mlx/transforms.cpp)."""
    makers = {name: o for o in operations for name in o.outputs if id(o) not in done}
    needed, look = {}, [makers[name] for name in outputs if name in makers]
    while look:
        operation = look.pop()
        if id(operation) not in needed:
            needed[id(operation)] = operation
            look += [makers[name] for name in operation.inputs if name in makers]
    asked = Primitive("asked", tuple(outputs), ())
    left = Counter(id(makers[name]) for o in (*needed.values(), asked) for name in o.inputs if name in makers)
    tape, place = [asked], 0
    deeper: list[tuple[Primitive, int]] = []
    while place < len(tape) or deeper:
        if place < len(tape):
            operation, start = tape[place], 0
            place += 1
        else:
            operation, start = deeper.pop()
        for number in range(start, len(operation.inputs)):
            maker = makers.get(operation.inputs[number])
            if maker is None:
                continue
            if len(tape) - place >= _WIDTH:
                deeper.append((operation, number))
                break
            left[id(maker)] -= 1
            if left[id(maker)] == 0:
                tape.append(maker)
    return tape[:0:-1]
