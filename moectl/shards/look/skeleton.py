"""The skeleton of a model: mlx-lm's own module tree for a config.json, without weights and without memory for them.

It gives the names and shapes of all parameters. It never imports code that a repository brings.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import MODEL_REMAPPING, _get_classes

from moectl.errors import CheckpointError
from moectl.model.config_keys import CORRECT
from moectl.shards.look.exceptions import find_own_file

# Names of numbers of modules, each a Python object, and the most of them that any model has.
_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_experts", "n_routed_experts")
_MOST = 4096


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A module tree whose parameters are zeros that take no memory."""

    model: Any  # mlx-lm's Model
    model_type: str  # as config.json has it

    @property
    def layers(self) -> list[Any]:
        found: list[Any] = self.model.layers
        return found

    @property
    def parameters(self) -> dict[str, mx.array]:
        """All parameters by name; only shapes and dtypes mean something."""
        return dict(tree_flatten(self.model.parameters()))

    @property
    def paths(self) -> dict[int, str]:
        """The path of each module, by its id."""
        return {id(module): path for path, module in self.model.named_modules()}


def make_skeleton(config: Mapping[str, Any]) -> Skeleton:
    """Build the skeleton of the model that a config.json describes. Raises CheckpointError."""
    model_type = config.get("model_type")
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"config.json names a program of its own, model_file = {config['model_file']!r}: moectl runs no code of a"
            " repository",
            hint="use a checkpoint that mlx-lm's own model files can read",
        )
    known = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    if not isinstance(model_type, str) or MODEL_REMAPPING.get(model_type, model_type) not in known:
        raise _unknown(model_type)
    own = copy.deepcopy(dict(config))  # some model files write into it
    _check_depth(own)
    try:
        model_class, args_class = find_classes(own)
    except AttributeError:  # a module of mlx-lm that is no model file
        raise _unknown(model_type) from None
    except (ImportError, SystemExit, ValueError) as error:  # some want a library, and end the program without it
        raise CheckpointError(
            f"mlx-lm's model file for {model_type} cannot be loaded: it wants a library that moectl does not have",
            hint="use another model",
        ) from error
    try:
        model = model_class(args_class.from_dict(own))
    except CheckpointError:
        raise
    except Exception as error:
        # A model file says in any way that a key is missing or wrong; none of them checks config.json.
        raise CheckpointError(
            f"config.json does not describe a model that mlx-lm can build: {model_type}: {_line(error)}",
            hint="compare config.json with the one of the original repository",
        ) from error
    empty(model)
    model.eval()
    return Skeleton(model, model_type)


def find_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the classes of a model and of its arguments."""
    own_file = find_own_file(config["model_type"])
    return (own_file.Model, own_file.ModelArgs) if own_file else _get_classes(config)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undo at the end what the block does to a module and those below: some keep what they compute in a call."""
    kept = [(inner, dict(inner), dict(inner.__dict__)) for _, inner in module.named_modules()]
    try:
        yield
    finally:
        for inner, items, attributes in kept:
            inner.clear()
            dict.update(inner, items)
            inner.__dict__.clear()
            inner.__dict__.update(attributes)


def _check_depth(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a number of layers that no model has: building them would never end."""
    tables = [table for table in (config, config.get("text_config")) if isinstance(table, Mapping)]
    for table in tables:
        for key in _COUNTS:
            if isinstance(value := table.get(key), int) and value > _MOST:
                raise CheckpointError(f"config.json: {key} is {value}, more than any model has", hint=CORRECT)


def empty(module: nn.Module) -> None:
    """Replace a module's parameters by zeros of the same shapes, which take no memory."""
    module.update(tree_map(_zeros, module.parameters()))


def _zeros(array: mx.array) -> mx.array:
    return mx.broadcast_to(mx.array(0, dtype=array.dtype), array.shape)


def _unknown(model_type: object) -> CheckpointError:
    return CheckpointError(
        f"config.json has model_type = {model_type!r}, and mlx-lm has no model file of that name",
        hint="use a model that mlx-lm knows; a newer version of moectl may know more",
    )


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"missing key {text}" if isinstance(error, KeyError) else text or type(error).__name__
