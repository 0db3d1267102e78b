"""What a pass keeps in memory beside weights and caches: its intermediate arrays, from MLX's own graph of the pass.

A model is called with a prompt, and nothing is computed. MLX's graph of that call has each array's shape and the order
in which MLX will make them; from it follows which arrays are there at once. An array that is made by a divided
projection is divided as that one is, up to the projection that closes the unit or the attention.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import gated_delta, ssm
from mlx_lm.models.cache import make_prompt_cache

from moectl.model.regions import Division, Role
from moectl.model.structure import Moment
from moectl.shards.look.caches import list_parts
from moectl.shards.look.hooks import Hook, hooked, uncompiled
from moectl.shards.look.pass_graph import ATTENTION, STACKS, PassGraph, Primitive, make_graph
from moectl.shards.look.skeleton import Skeleton

TOKENS = 509  # of the prompt: a prime number, so that a dimension of this length is the prompt's
_ELEMENT = 4  # bytes: a skeleton's arrays are float32
# MLX queues about 100 commands before it waits, and an array is held until the last command that reads it has run. An
# operation is two commands, another view of an array one (mlx/scheduler.h, backend/cpu/encoder.h and eval.cpp); with
# its hidden copies, this number fits what was measured best.
_QUEUED = 64
_LIKE = 2  # layers of each kind that are looked at: what one leaves meets what the next one makes
# Operations whose result is their input, seen in another way; some have to copy what is not in order.
_COPYING_VIEWS = {"Reshape", "Flatten", "Unflatten"}
_VIEWS = {
    *("Broadcast", "BroadcastAxes", "ExpandDims", "Squeeze", "Transpose", "Slice", "Split", "StopGradient", "View"),
    *("AsStrided", "DynamicSlice", "Copy"),
    *_COPYING_VIEWS,
}
_REORDERING = {"Broadcast", "BroadcastAxes", "Transpose", "Slice", "Split", "AsStrided", "DynamicSlice"}
_PRODUCTS = {"Matmul", "QuantizedMatmul", "GatherMM", "GatherQMM", "AddMM"}
_FUSED_WIDTHS = (64, 80, 128)  # of heads for which MLX's attention on a GPU writes no scores
_FRACTIONS = ((1.0, 1.0), (0.5, 1.0), (0.5, 0.5), (0.25, 1.0), (0.25, 0.25), (0.0, 1.0), (0.0, 0.0))


def find_moments(
    skeleton: Skeleton, order: Sequence[int], divisions: Mapping[str, Division], *, on_gpu: bool
) -> tuple[Moment, ...]:
    """Return the moments of a prompt's pass at which most is there, one for each way to divide the model.

    `order` has the kind of each layer. A CPU waits where experts and attention work outside MLX
    (`engine.network`); a GPU has one operation for an attention. Returns nothing where MLX cannot write the
    graph down.
    """
    device = mx.default_device()
    mx.set_default_device(mx.cpu)  # so that the graph is the same on every machine
    try:
        with _fused_attention(on_gpu=on_gpu), _no_loops(on_gpu=on_gpu), _only_some(skeleton, order):
            graph = _read_graph(skeleton, divisions, waits=not on_gpu)
    except Exception:  # any code of a model file runs here, and with layers that give back what they get
        return ()
    finally:
        mx.set_default_device(device)
    return _Pass(graph, divisions, waits=not on_gpu).find_most()


def count_launches(skeleton: Skeleton, order: Sequence[int]) -> list[int]:
    """Return how many operations a layer of each kind has on a GPU when one token passes; 0 where that is not known."""
    device, counts = mx.default_device(), []
    mx.set_default_device(mx.cpu)
    try:
        with _single_operations():
            for kind in (None, *range(max(order) + 1)):
                with _only_some(skeleton, order, only=kind):
                    graph = _read_graph(skeleton, {}, tokens=1, whole=True)
                counts.append(sum(operation.name not in _VIEWS for operation in graph.operations))
    except Exception:  # as above
        return [0] * (max(order) + 1)
    finally:
        mx.set_default_device(device)
    return [count - counts[0] for count in counts[1:]]


def _read_graph(
    skeleton: Skeleton,
    divisions: Mapping[str, Division],
    *,
    tokens: int = TOKENS,
    whole: bool = False,
    waits: bool = False,
) -> PassGraph:
    """Return the graph of a prompt's pass, as far as the caches need it, or the `whole` of it."""
    model, before = skeleton.model, skeleton.parameters
    divided = {name: array for name, array in before.items() if _division_of(name, divisions) is not None}
    told: list[dict[str, Any]] = []

    def run(prompt: mx.array, *arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(divided, arrays, strict=True))))
        caches = make_prompt_cache(model)
        logits = model(prompt, cache=caches)
        held = (_arrays_of(cache) for cache in caches)
        return [array for arrays in held for array in arrays] + [logits] * whole

    contiguous = mx.contiguous
    mx.contiguous = lambda array, *_, **__: mx.abs(array)  # MLX cannot write that operation down
    try:
        with uncompiled():
            mx.export_function(told.append, run, mx.zeros((1, tokens), dtype=mx.int32), *divided.values())
    finally:
        mx.contiguous = contiguous
        model.update(tree_unflatten(list(before.items())))
    return make_graph(told, list(divided), waits=waits)


def _arrays_of(cache: Any) -> Iterator[mx.array]:
    for part in list_parts(cache):
        held = [part.__dict__.get(name) for name in ("keys", "values", "cache")]
        yield from (array for _, array in tree_flatten(held) if isinstance(array, mx.array) and array.size)


def _division_of(name: str, divisions: Mapping[str, Division]) -> Division | None:
    return divisions.get(name) or divisions.get(name.rpartition(".")[0])


class _Pass:
    """One pass, operation by operation. A buffer has the name of the array that it was made for."""

    def __init__(self, graph: PassGraph, divisions: Mapping[str, Division], *, waits: bool) -> None:
        self._graph = graph
        self._waits = waits  # for what it has queued, before stacked experts work
        self._divisions = divisions
        self._buffer = {name: name for name in graph.given}
        self._in_order: dict[str, bool] = {}
        self._kind: dict[str, str] = {}  # of arrays: "hidden" or "heads", as they are divided
        self._live: dict[str, tuple[str, bool, int]] = {}  # buffer → kind, whether it is of pairs of tokens, bytes
        self._sums: Counter[tuple[str, bool]] = Counter()
        self._best: dict[tuple[float, float], tuple[float, dict[tuple[str, bool], int]]] = {}

    def find_most(self) -> tuple[Moment, ...]:
        self._share_buffers()
        uses, kept = self._count_uses(), {self._buffer[name] for name in self._graph.outputs}
        last_read: dict[str, int] = {}  # buffer → number of the command that reads it last, so far
        waiting: defaultdict[int, list[str]] = defaultdict(list)
        outside = 0  # the command at which work outside MLX was waited for last
        command = run = 0  # so many commands are queued, and so many have run
        for number, operation in enumerate(self._graph.operations):
            command += 1 if operation.name in _VIEWS else 2
            run = max(run, command if self._waits and operation.name == ATTENTION else command - _QUEUED)
            for done in [done for done in waiting if done <= run]:
                for buffer in waiting.pop(done):
                    self._release(buffer)
            for name in operation.outputs:
                self._make(operation, name, kept, last_read, uses, number, command)
            for name in operation.inputs:
                buffer = self._buffer[name]
                last_read[buffer] = command
                if uses[buffer] == number:
                    waiting[command].append(buffer)
            self._compare()
            if self._waits and operation.name in STACKS:
                # All has run; but what the caller has a name for is held until the next such work has returned.
                run, outside = max(run, outside), command
        return tuple(dict.fromkeys(_make_moment(sums) for _, sums in self._best.values()))

    def _share_buffers(self) -> None:
        for operation in self._graph.operations:
            for name in operation.outputs:
                first = operation.inputs[0] if operation.inputs else ""
                in_order = self._in_order.get(first, True)
                shares = operation.name in _VIEWS and (in_order or operation.name not in _COPYING_VIEWS)
                self._buffer[name] = self._buffer[first] if shares else name
                self._in_order[name] = not (shares and (not in_order or operation.name in _REORDERING))
                self._kind[name] = self._find_kind(operation)

    def _find_kind(self, operation: Primitive) -> str:
        """Return how an operation's results are divided."""
        parameters = self._graph.parameters
        if operation.name in _PRODUCTS:
            for name in operation.inputs:
                if (path := parameters.get(self._buffer[name])) is not None:
                    division = _division_of(path, self._divisions)
                    assert division is not None
                    if division.axis == -1:
                        return ""
                    return "hidden" if division.pieces.role in (Role.HIDDEN, Role.EXPERT) else "heads"
        return max((self._kind.get(name, "") for name in operation.inputs), default="")

    def _count_uses(self) -> dict[str, int]:
        """Return the number of the operation that reads each buffer last."""
        found: dict[str, int] = {}
        for number, operation in enumerate(self._graph.operations):
            for name in (*operation.inputs, *operation.outputs):
                found[self._buffer[name]] = number
        return found

    def _make(
        self,
        operation: Primitive,
        name: str,
        kept: set[str],
        last_read: dict[str, int],
        uses: dict[str, int],
        number: int,
        command: int,
    ) -> None:
        buffer, size = self._buffer[name], self._graph.bytes[name]
        if buffer != name or name in self._graph.given or buffer in kept:
            return  # it is there already, or it is a cache's
        pairs = self._graph.shapes[name].count(TOKENS) > 1
        if operation.name not in _PRODUCTS:
            for given in operation.inputs:
                source = self._buffer[given]
                is_last = source in self._live and uses[source] == number
                free = is_last and last_read.get(source, -_QUEUED) <= command - _QUEUED
                if free and self._live[source][2] == size and self._in_order.get(given, True):
                    self._release(source)  # MLX writes the result into it
                    break
        self._live[name] = (self._kind[name], pairs, size)
        self._sums[self._kind[name], pairs] += size

    def _release(self, buffer: str) -> None:
        if (held := self._live.pop(buffer, None)) is not None:
            self._sums[held[0], held[1]] -= held[2]

    def _compare(self) -> None:
        for hidden, heads in _FRACTIONS:
            part = {"": 1.0, "hidden": hidden, "heads": heads}
            total = sum(part[kind] * size for (kind, _), size in self._sums.items())
            if total > self._best.get((hidden, heads), (0.0, {}))[0]:
                self._best[hidden, heads] = total, dict(self._sums)


def _make_moment(sums: Mapping[tuple[str, bool], int]) -> Moment:
    def each(kind: str, pairs: bool) -> int:
        return math.ceil(sums.get((kind, pairs), 0) / _ELEMENT / TOKENS ** (2 if pairs else 1))

    return Moment(each("", False), each("hidden", False), each("heads", False), each("", True), each("heads", True))


_ALL = -1  # kinds


@contextmanager
def _only_some(skeleton: Skeleton, order: Sequence[int], only: int | None = _ALL) -> Iterator[None]:
    """Let all but the first layers of each kind give back what they get; or all but the first of one kind, or all."""
    seen: Counter[int] = Counter()
    left: list[tuple[Any, Hook]] = []
    for layer, kind in zip(skeleton.layers, order, strict=True):
        seen[kind] += 1
        if seen[kind] > (_LIKE if only == _ALL else int(kind == only)):
            left.append((layer, lambda call, *args, **kwargs: next(iter((*args, *kwargs.values())))))
    with hooked(left):
        yield


@contextmanager
def _no_loops(*, on_gpu: bool) -> Iterator[None]:
    """Let mlx-lm's loop over a prompt's tokens (linear attention) make what it leaves, without its rounds.

    On a CPU the results of all rounds come after the last state, so that each round's state is kept until then.
    """
    before = gated_delta.gated_delta_ops

    def leave(q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, *_: Any) -> tuple[mx.array, mx.array]:
        q, k = (mx.repeat(array, v.shape[-2] // array.shape[-2], -2) for array in (q, k))
        rows = q[..., :1] * k[..., :1] * v * beta[..., None] * g.reshape(*g.shape[:3], -1)[..., :1]  # (B, T, H, D)
        states = mx.broadcast_to(rows[..., None], (*rows.shape, q.shape[-1]))
        states = mx.abs(states[:, -1:] if on_gpu else states)  # (B, T, H, D, keys' width)
        last = mx.abs(states[:, -1])
        found: Any = (rows if on_gpu else states[..., 0]) * last.reshape(-1)[0]
        for _round in range(_QUEUED):  # the loop has more commands than are queued
            found = mx.stop_gradient(found)
        return mx.abs(found), last

    gated_delta.gated_delta_ops = leave
    try:
        yield
    finally:
        gated_delta.gated_delta_ops = before


@contextmanager
def _single_operations() -> Iterator[None]:
    """Let what is one operation on a GPU be one in the graph, too."""

    def one(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return mx.abs(x)

    def recur(x: mx.array, *args: Any, **kwargs: Any) -> tuple[mx.array, mx.array]:
        state = next(value for value in (*args, *kwargs.values()) if isinstance(value, mx.array) and value.ndim == 4)
        return mx.abs(x), mx.abs(state)

    def attend(q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
        shape = (*q.shape[:-1], v.shape[-1])
        return mx.broadcast_to(q[..., :1], shape) * (k.reshape(-1)[0] + v.reshape(-1)[0])

    with ExitStack() as held:
        stand_ins: list[tuple[Any, str, Callable[..., Any]]] = [
            *((mx.fast, name, one) for name in ("rms_norm", "layer_norm", "rope")),
            (mx.fast, "scaled_dot_product_attention", attend),
            (ssm, "ssm_attn", recur),
        ]
        for owner, name, stand_in in stand_ins:
            held.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        with _no_loops(on_gpu=True):
            yield


@contextmanager
def _fused_attention(*, on_gpu: bool) -> Iterator[None]:
    """Let an attention give its result without scores: on a GPU for the heads for which it can, on a CPU always.

    A CPU works outside MLX then (`engine.network.attention`), when all that is queued has run.
    """
    before: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention

    def stand_in(q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if on_gpu and (q.shape[-1] not in _FUSED_WIDTHS or q.shape[-1] != v.shape[-1]):
            return before(q, k, v, *args, **kwargs)
        rows, rest = mx.broadcast_to(q[..., :1], (*q.shape[:-1], v.shape[-1])), k.reshape(-1)[0] + v.reshape(-1)[0]
        return rows * rest if on_gpu else mx.arctan2(rows, rest)

    mx.fast.scaled_dot_product_attention = stand_in
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = before
