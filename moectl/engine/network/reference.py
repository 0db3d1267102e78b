"""A shard set's whole model, run once in little memory: mlx-lm's own, undivided, with its matrices on disk.

One pass goes through all layers. A layer's norms and other small arrays are there only while it runs, and its matrices
are read piece by piece, each once for all tokens. What its matrices gave is kept until the layer is done, so that the
parts of all ranks can be computed from it without reading anything again (`rehearsal`). For a CPU.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from moectl.engine.network.experts import run_grouped, to_numpy
from moectl.engine.network.joined import JoinedMatrix, JoinedSet
from moectl.model.canary import NoReference
from moectl.model.regions import Span
from moectl.shards.look.caches import list_parts
from moectl.shards.look.flow import TOKENS
from moectl.shards.look.graph import Graph
from moectl.shards.look.hooks import Hook, hook_call, hooked
from moectl.shards.look.skeleton import Skeleton
from moectl.shards.look.units import SWITCHES

_ON_DISK = ("weight", "scales", "biases", "global_scale")
_LINEAR = (nn.Linear, nn.QuantizedLinear)
_EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
_DIRECT_BYTES = 256 << 20  # of arrays that have to be in memory for one layer, in float32


@dataclass(slots=True)
class Product:
    """What one call of a matrix gave."""

    matrix: JoinedMatrix
    x: mx.array  # (…, in)
    indices: mx.array | None  # of a stack
    y: mx.array  # (…, out)
    parts: list[mx.array]  # by rank, without the bias, where ranks have columns
    bias: mx.array | None  # that was added


@dataclass(slots=True)
class LayerRecord:
    """What happened in one layer."""

    products: defaultdict[str, list[Product]] = field(default_factory=lambda: defaultdict(list))  # by path
    totals: list[mx.array] = field(default_factory=list)  # what exchanges have to add up to
    pairs: dict[str, tuple[mx.array, mx.array]] = field(default_factory=dict)  # a stack's indices and results
    small: dict[str, mx.array] = field(default_factory=dict)  # the arrays that are in memory


OnLayer = Callable[[int, tuple[Any, ...], dict[str, Any], Any, LayerRecord], None]  # layer, arguments, result, record


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of unequal length as rows of a batch: behind its own tokens each row goes on as the longest one.

    Only the prompts' tokens are multiplied with matrices; the others take what the longest row's have in their place.
    """

    tokens: np.ndarray[Any, np.dtype[np.int64]]  # (prompts, L)
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> PromptBatch:
        """Return prompts as a batch; the last one is the longest."""
        rows = [[*tokens, *prompts[-1][len(tokens) :]] for tokens in prompts]
        return cls(np.array(rows), tuple(map(len, prompts)))

    @property
    def keep(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The numbers of the prompts' tokens, counted through the batch."""
        width = self.tokens.shape[1]
        return np.concatenate([row * width + np.arange(length) for row, length in enumerate(self.lengths)])

    @property
    def spread(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For each token of the batch, the number among `keep` of the one that stands for it."""
        starts = np.cumsum([0, *self.lengths])
        width = np.arange(self.tokens.shape[1])
        rows = [np.where(width < n, start, starts[-2]) + width for n, start in zip(self.lengths, starts, strict=False)]
        return np.concatenate(rows)


class Reference:
    """The model; `ranks` is how many ranks have a part of it, `dtype` the type of what goes from module to module."""

    def __init__(
        self,
        joined: JoinedSet,
        skeleton: Skeleton,
        spare: Skeleton,
        batch: PromptBatch,
        *,
        ranks: int,
        dtype: mx.Dtype,
    ) -> None:
        self.model: Any = skeleton.model
        self.record = LayerRecord()
        self.caches = make_prompt_cache(self.model)
        self._joined, self._ranks, self._dtype = joined, ranks, dtype
        self._casts: Callable[[str], bool] = getattr(self.model, "cast_predicate", lambda _: True)
        self._opened: dict[str, JoinedMatrix] = {}
        self._batch, self._keep, self._spread = batch, batch.keep, batch.spread
        self._done = 0  # calls of layers
        self._matrices = find_matrices(self.model)
        direct, self.calls = survey(spare)
        on_disk = {f"{path}.{name}" for path in self._matrices for name in _ON_DISK} - direct
        self.small = [name for name in skeleton.parameters if name not in on_disk]
        self.prefixes = [f"{skeleton.paths[id(layer)]}." for layer in skeleton.layers]
        self._limit_direct(skeleton)
        forget(self.model)
        for path, module in self._matrices.items():
            hook_call(module, partial(self._multiply, path, module))
            if isinstance(module, _EMBEDDING):
                module.as_linear = partial(self._apply, path, module)

    def run(self, on_layer: OnLayer) -> mx.array:
        """Return the logits (prompts, V) of each prompt's last token, in float32.

        Raises NoReference, and IntegrityError from the set's files.
        """
        outer = [name for name in self.small if not name.startswith(tuple(self.prefixes))]
        fill(self.model, self._read(outer))
        hooks = [(layer, partial(self._pass_layer, n, on_layer)) for n, layer in enumerate(self.model.layers)]
        with hooked(hooks):
            logits = self.model(mx.array(self._batch.tokens), cache=self.caches)
        if self._done != self.calls or not self.calls:
            raise NoReference("its layers are not run one after the other")
        found = self._pick(logits)[:, 0].astype(mx.float32)
        mx.eval(found)
        self._close()
        if not mx.isfinite(found).all().item():
            raise NoReference("its logits are no numbers when its matrices stay on disk")
        return found

    def _pass_layer(self, number: int, on_layer: OnLayer, call: Hook, *args: Any, **kwargs: Any) -> Any:
        mine = [name for name in self.small if name.startswith(self.prefixes[number])]
        self.record = LayerRecord(small=self._read(mine))
        fill(self.model, self.record.small)
        given, named = self._copy(args), self._copy(kwargs)
        found = call(*args, **kwargs)
        leaves = list(arrays_of(found))
        mx.eval(leaves, [cache.state for cache in self.caches if not cache.empty()])
        if not all(mx.isfinite(leaf).all().item() for leaf in leaves if mx.issubdtype(leaf.dtype, mx.floating)):
            raise NoReference(f"what layer {number} computes is no number when its matrices stay on disk")
        on_layer(number, given, named, found, self.record)
        forget(self.model, mine)
        self.record = LayerRecord()
        self._close()
        self._done += 1
        return found

    def _copy(self, value: Any) -> Any:
        """Return arguments as they are now: a layer may change what it is given. Caches stay what they are."""
        known = {id(part) for cache in self.caches for part in (cache, *list_parts(cache))}

        def copied(leaf: Any) -> Any:
            return leaf if isinstance(leaf, mx.array) or id(leaf) in known else copy.deepcopy(leaf)

        return tree_map(copied, value)

    def _read(self, names: Sequence[str]) -> dict[str, mx.array]:
        shapes = dict(tree_flatten(self.model.parameters()))
        found = {name: self._joined.read(name, shapes[name].shape) for name in names if self._joined.has(name)}
        ready = {
            name: array.astype(self._dtype) if self._is_cast(name, array) else array for name, array in found.items()
        }
        mx.eval(list(ready.values()))
        found.clear()
        self._joined.release()
        return ready

    def _is_cast(self, name: str, array: mx.array) -> bool:
        return mx.issubdtype(array.dtype, mx.floating) and self._casts(name)

    def _close(self) -> None:
        self._opened.clear()
        self._joined.close_files()

    def _open(self, path: str, module: Any) -> JoinedMatrix:
        if path not in self._opened:
            self._opened[path] = self._joined.open_matrix(path, module)
        return self._opened[path]

    def _multiply(self, path: str, module: Any, call: Hook, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if isinstance(module, _EMBEDDING):
            rows = self._open(path, module).read_rows(np.array(x).reshape(-1).tolist())
            return mx.array(rows).reshape(*x.shape, -1).astype(self._dtype)
        return self._apply(path, module, x, *args)

    def _apply(self, path: str, module: Any, x: mx.array, indices: mx.array | None = None, *_: Any) -> mx.array:
        """Return a product (…, out), of the wanted rows only behind the last layer."""
        if self._done == self.calls > 0 and x.ndim == 3 and indices is None:
            x = self._pick(x)
        matrix = self._open(path, module)
        parts: list[mx.array] = []
        if matrix.axis == -1:  # one rank after the other, so that each file is read once and little is held
            for rank in range(self._ranks):
                if spans := matrix.spans(rank):
                    part = take_columns(x, spans)
                    parts.append(self._times(part, indices, matrix.rows, partial(matrix.times_part, rank)))
                else:  # it holds nothing of this unit
                    parts.append(mx.array(0, dtype=self._dtype))
            y: mx.array = sum(parts[1:], parts[0])
            parts = [mx.broadcast_to(part, y.shape) for part in parts]
        else:
            y = self._times(x, indices, matrix.rows, matrix.times)
        bias = module.bias if "bias" in module else None
        if bias is not None and indices is not None:
            bias = bias[indices][..., None, :]
        y = (y if bias is None else y + bias).astype(x.dtype)
        mx.eval(y, parts)
        self.record.products[path].append(Product(matrix, x, indices, y, parts, bias))
        return y

    def _times(self, x: mx.array, indices: mx.array | None, width: int, times: Callable[..., Any]) -> mx.array:
        """Return products (…, width), of the prompts' own tokens where x has a row for each token of the batch."""
        if indices is not None:
            return run_grouped(x, indices, width, times)
        rows = to_numpy(x).reshape(-1, x.shape[-1])
        is_batch = len(rows) == len(self._spread)
        made = times(rows[self._keep])[self._spread] if is_batch else times(rows)
        return mx.array(made).reshape(*x.shape[:-1], width)

    def _pick(self, x: mx.array) -> mx.array:
        """Return each prompt's last token of a batch, (prompts, 1, D)."""
        if x.shape[1] == 1:
            return x
        return mx.stack([x[row, length - 1] for row, length in enumerate(self._batch.lengths)])[:, None]

    def _limit_direct(self, skeleton: Skeleton) -> None:
        """Raise NoReference where too much of a layer would have to be in memory."""
        sizes: Counter[str] = Counter()
        shapes = skeleton.parameters
        for name in self.small:
            prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
            sizes[prefix] += 4 * math.prod(shapes[name].shape)
        if max(sizes.values()) > _DIRECT_BYTES:
            raise NoReference("it uses large matrices in a way in which they cannot stay on disk")


def find_matrices(model: Any) -> dict[str, Any]:
    """Return the modules of a model that multiply with a matrix, and do nothing else, by path."""
    stacks = {id(m) for unit in model.modules() if isinstance(unit, SwitchGLU | SwitchMLP) for m in unit.modules()}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        kinds = [kind for kind in (*_LINEAR, *_EMBEDDING, *SWITCHES) if type(module).__call__ is kind.__call__]
        if kinds and (kinds[0] not in SWITCHES or id(module) in stacks):
            found[path] = module
    return found


def survey(skeleton: Skeleton) -> tuple[set[str], int]:
    """Return the names of matrices' arrays that a model uses past the calls of their modules, and its calls of layers.

    Found by a pass of which nothing is computed; the skeleton is of no use afterwards.
    """
    model, results, calls = skeleton.model, list[mx.array](), 0
    matrices = find_matrices(model)
    named = {
        f"{path}.{name}": module[name]
        for path, module in matrices.items()
        for name in _ON_DISK
        if isinstance(module.get(name), mx.array)
    }
    forget(model)  # else arrays of the same place in memory could count as one
    named = {name: parameter for name, parameter in tree_flatten(model.parameters()) if name in named}

    def replace(call: Hook, *args: Any, **kwargs: Any) -> mx.array:
        results.extend(arrays_of(args))
        found = call(*args, **kwargs)
        return mx.zeros(found.shape, found.dtype)

    def note(call: Hook, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = call(*args, **kwargs)
        results.extend(arrays_of(found))
        return found

    for module in matrices.values():
        if isinstance(module, _EMBEDDING):
            module.as_linear = partial(replace, module.as_linear)
    with hooked([*((m, replace) for m in matrices.values()), *((layer, note) for layer in model.layers)]):
        results.append(model(mx.zeros((1, TOKENS), dtype=mx.int32), cache=make_prompt_cache(model)))
    return Graph(results, named).find_sources(results), calls


def forget(model: Any, names: Sequence[str] | None = None) -> None:
    """Replace (some of) a model's parameters by what takes no memory and shows in all results: no numbers."""
    wanted = None if names is None else set(names)
    found = [(n, _no_number(a)) for n, a in tree_flatten(model.parameters()) if wanted is None or n in wanted]
    model.update(tree_unflatten(found))


def fill(model: Any, arrays: dict[str, mx.array]) -> None:
    """Put arrays into a model."""
    model.update(tree_unflatten(list(arrays.items())))


def arrays_of(value: Any) -> Iterator[mx.array]:
    """Yield the arrays of a result, however they are nested."""
    yield from (leaf for _, leaf in tree_flatten([value]) if isinstance(leaf, mx.array))


def take_columns(rows: Any, spans: Sequence[Span]) -> Any:
    """Return these columns of an array, one span after the other."""
    if len(spans) == 1:
        return rows[..., slice(*spans[0])]
    parts = [rows[..., slice(*span)] for span in spans]
    if isinstance(rows, mx.array):
        return mx.concatenate(parts, axis=-1) if parts else rows[..., :0]
    return np.concatenate(parts, axis=-1) if parts else rows[..., :0]


def _no_number(array: mx.array) -> mx.array:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return mx.broadcast_to(mx.array(math.nan if is_float else 0, dtype=array.dtype), array.shape)
