"""Open a checkpoint both ways: traced, to be read in parts, and as mlx-lm itself loads and converts it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import load_config, load_model, quantize_model

from moectl.model.regions import Region
from moectl.model.structure import Quantization
from moectl.shards.look.skeleton import find_classes
from moectl.shards.source.stored import StoredReader, name_stored
from moectl.shards.source.tensors import StoredTensor, read_header
from moectl.shards.trace.formats import Format, read_format, unpack
from moectl.shards.trace.parts import full, part
from moectl.shards.trace.precision import Settled, settle
from moectl.shards.trace.traced import Expression, trace


def make_model(config: dict[str, Any]) -> Any:
    """Return the model for a config; nothing evaluates it."""
    model_class, args_class = find_classes(config)
    return model_class(args_class.from_dict(config))


@dataclass
class Traced:
    directory: Path
    model: Any
    config: dict[str, Any]
    format: Format
    stored: dict[str, StoredTensor]
    tensors: dict[str, Expression]  # as `sanitize` was given them
    parameters: dict[str, Expression]
    read: StoredReader
    settled: Settled

    def part(self, name: str, region: Region | None = None) -> mx.array:
        node = self.parameters[name]
        return part(node, full(node.shape) if region is None else region, self.read)


def open_traced(directory: Path, wanted: Quantization | None = None, recipe: str | None = None) -> Traced:
    """Trace a checkpoint in a directory."""
    config = load_config(directory)
    stored: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        stored |= read_header(path, path.name)
    form, model = read_format(config), make_model(config)
    tensors = unpack(name_stored(stored), form)
    settled = settle(model, config, trace(model, tensors), form, wanted, recipe)
    files: dict[str, int] = {}

    def open_file(name: str) -> int:
        if name not in files:
            files[name] = os.open(directory / name, os.O_RDONLY)
        return files[name]

    reader = StoredReader(stored, open_file)
    return Traced(directory, model, config, form, stored, tensors, settled.parameters, reader, settled)


def load_whole(
    directory: Path, wanted: Quantization | None = None, recipe: str | None = None, *, cast: bool = False
) -> dict[str, mx.array]:
    """Return the parameters that mlx-lm has after loading, or after converting (`cast`: in 16 bits), a checkpoint."""
    with redirect_stdout(io.StringIO()):
        model, config = load_model(directory, lazy=True)
        if wanted is not None or cast:
            _cast(model, config)
        if wanted is not None:
            predicate = mixed_quant_predicate_builder(recipe, model, wanted.group_size) if recipe else None
            quantize_model(model, config, wanted.group_size, wanted.bits, mode=wanted.mode, quant_predicate=predicate)
    return dict(tree_flatten(model.parameters()))


def _cast(model: Any, config: dict[str, Any]) -> None:
    """Give floats the type that `mlx_lm.convert` gives them, between loading and quantising."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name is not None:
        dtype = getattr(mx, name)
        casts: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

        def cast(path: str, value: mx.array) -> mx.array:
            return value.astype(dtype) if casts(path) and mx.issubdtype(value.dtype, mx.floating) else value

        model.update(tree_map_with_path(cast, model.parameters()))
