"""Decide how many bits each module has, by mlx-lm's own functions: as stored, as wanted, or as a recipe says.

It works on a model that nothing has evaluated and on traced parameters; the result is one expression for each array
of the files to be written.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.convert import MODEL_CONVERSION_DTYPES, QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.utils import _takes_global_scale, infer_quant_config, quantize_model

from moectl.errors import CheckpointError, PlanError
from moectl.model.config_keys import CORRECT
from moectl.model.structure import Quantization
from moectl.shards.source.stored import spell
from moectl.shards.trace.formats import Format, quantise
from moectl.shards.trace.traced import ANOTHER_COPY, Expression, check_parameters, record


@dataclass(frozen=True, slots=True)
class Settled:
    """What the arrays of a model will be."""

    parameters: dict[str, Expression]  # as the files will hold them
    table: dict[str, Any] | None  # config.json's `quantization`; None when nothing is quantised


def settle(
    model: Any,
    config: Mapping[str, Any],
    traced: Mapping[str, Expression],
    form: Format,
    wanted: Quantization | None = None,
    recipe: str | None = None,
) -> Settled:
    """Make the model's modules quantised, as stored or as wanted, and return its parameters, checked.

    Equal to `mlx_lm.convert` with the same arguments, and to loading what is stored where there is no `wanted`. Raises
    CheckpointError where the parameters are not the model's, PlanError where it cannot be quantised as wanted.
    """
    table = dict(form.table) if form.table else None
    if table is not None:
        _keep(model, table, traced)
        if not any("scales" in module for _, module in model.named_modules()):
            raise CheckpointError("config.json says that the checkpoint is quantised, and no tensor is", hint=CORRECT)
    given = dict(traced)
    if wanted is not None:
        if form.kind == "mlx":
            raise PlanError(
                "the checkpoint is quantised already, and cannot be quantised again",
                hint="leave --q-bits, --q-group-size and --q-mode out, or start from the 16-bit checkpoint",
            )
        given = cast(model, config, given)
        table = _quantise(model, config, table, wanted, recipe)
    parameters = _quantise_nodes(model, given)
    check_parameters({name: tuple(a.shape) for name, a in tree_flatten(model.parameters())}, parameters)
    for name, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and not mx.issubdtype(parameters[name].dtype, mx.floating):
            raise CheckpointError(
                f"{name} is stored as {spell(parameters[name].dtype)}, and the model needs floats", hint=ANOTHER_COPY
            )
    return Settled(parameters, None if table is None else _complete(model, table))


def quantise_by(model: Any, table: Mapping[str, Any], names: Collection[str]) -> None:
    """Make those modules quantised of which scales are among `names`, each as a complete table says."""

    def choose(path: str, module: Any) -> Any:
        return table.get(path, True) if f"{path}.scales" in names and hasattr(module, "to_quantized") else False

    nn.quantize(
        model,
        group_size=table["group_size"],
        bits=table["bits"],
        mode=table.get("mode") or "affine",
        class_predicate=choose,
    )


def _complete(model: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table that names each module which is quantised in another way than most."""
    made = dict(table)
    usual = (table["bits"], table["group_size"], table.get("mode") or "affine")
    for path, module in model.named_modules():
        if "scales" in module:
            own = module.bits, module.group_size, getattr(module, "mode", "affine")
            if own != usual or "global_scale" in module:
                made[path] = dict(zip(("bits", "group_size", "mode"), own, strict=True))
                made[path] |= {"global_scale": True} if "global_scale" in module else {}
            else:
                made.pop(path, None)
    return made


def cast(model: Any, config: Mapping[str, Any], traced: Mapping[str, Expression]) -> dict[str, Expression]:
    """Return floats in the type that `mlx_lm.convert` gives them: config.json's, where `cast_predicate` allows."""
    name = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    if name not in MODEL_CONVERSION_DTYPES:
        return dict(traced)
    dtype = getattr(mx, str(name))
    casts: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def change(path: str, node: Expression) -> Expression:
        done: Expression = record(mx.array.astype, node, dtype)
        return done

    return {
        path: change(path, node) if mx.issubdtype(node.dtype, mx.floating) and casts(path) else node
        for path, node in traced.items()
    }


def source_of(node: Expression) -> tuple[Expression, Quantization | None]:
    """Return what an expression quantises, and how; itself and None where it does not quantise."""
    if node.operation.op is not quantise:
        return node, None
    group_size, bits, mode = node.operation.args[1:]
    return node.inputs[0], Quantization(bits, group_size, mode)


def _keep(model: Any, table: Mapping[str, Any], traced: Mapping[str, Expression]) -> None:
    """Make quantised the modules that are stored so: mlx_lm.utils.load_model's rule, which is a closure there."""

    def choose(path: str, module: Any) -> Any:
        if path in table:
            return table[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in traced:
            return False
        params = infer_quant_config(path, module, traced)
        if f"{path}.global_scale" in traced and _takes_global_scale(module):
            params["global_scale"] = True
        return params

    try:
        nn.quantize(
            model,
            group_size=table["group_size"],
            bits=table["bits"],
            mode=table.get("mode", "affine"),
            class_predicate=choose,
        )
    except (ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json: quantization does not fit the model: {error}", hint=ANOTHER_COPY
        ) from error


def count_left(model: Any, wanted: Quantization) -> float:
    """Return the part of a model's weights that stay in 16 bits because their rows are no whole groups.

    Raises PlanError where that are all of them.
    """
    left, done = 0, 0
    for _, module in model.named_modules():
        if "scales" in module:
            done += module.weight.size * 32 // module.bits
        elif hasattr(module, "to_quantized") and module.weight.shape[-1] % wanted.group_size:
            left += module.weight.size
    if left and not done:
        raise PlanError(
            f"groups of {wanted.group_size} divide no row of the model's matrices",
            hint="choose a smaller --q-group-size, --q-bits 16, or another --q-mode",
        )
    return left / max(1, left + done)


def quantise_as_wanted(model: Any, config: Mapping[str, Any], wanted: Quantization) -> None:
    """Make the modules quantised that `mlx_lm.convert` would quantise, and so. Raises PlanError."""
    _quantise(model, config, None, wanted, None)


def _quantise(
    model: Any, config: Mapping[str, Any], table: Mapping[str, Any] | None, wanted: Quantization, recipe: str | None
) -> dict[str, Any]:
    """Quantise a model as `mlx_lm.convert` does; return config.json's `quantization`."""
    if recipe is not None and recipe not in QUANT_RECIPES:
        raise PlanError(f"unknown recipe {recipe!r}; it is one of {', '.join(QUANT_RECIPES)}")
    if recipe is not None and wanted.mode != "affine":
        raise PlanError(f"{recipe} mixes affine precisions, and {wanted.mode} is wanted", hint="--q-mode affine")
    known = {**config, "quantization": dict(table)} if table else {**config}
    try:
        predicate = mixed_quant_predicate_builder(recipe, model, wanted.group_size) if recipe else None
        with redirect_stdout(io.StringIO()):  # it tells of bits per weight
            _, made = quantize_model(
                model, known, wanted.group_size, wanted.bits, mode=wanted.mode, quant_predicate=predicate
            )
    except (ValueError, TypeError) as error:
        raise PlanError(
            f"mlx-lm cannot quantise this model so: {error}", hint="choose another --q-bits, --q-group-size or --q-mode"
        ) from error
    result: dict[str, Any] = made["quantization"]
    return result


def _quantise_nodes(model: Any, traced: Mapping[str, Expression]) -> dict[str, Expression]:
    """Return the parameters of a model whose modules are quantised: those of modules not stored so are computed."""
    made = dict(traced)
    for path, module in model.named_modules():
        weight = traced.get(f"{path}.weight")
        if "scales" not in module or weight is None or f"{path}.scales" in traced:
            continue
        parts = record(quantise, weight, module.group_size, module.bits, module.mode)
        made |= {f"{path}.{name}": part for name, part in zip(("weight", "scales", "biases"), parts, strict=False)}
    return made
