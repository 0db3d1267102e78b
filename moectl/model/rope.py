"""The rotary embedding of a config.json: its base and its scaling, in each of the places where they may be.

Releases of transformers use different places: `attn_config.rope_theta`, `rope_theta`, `rope_scaling`,
`rope_parameters`. All that are present have to agree. The network computes, with mlx-lm's `initialize_rope`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from moectl.errors import CheckpointError
from moectl.model.config_keys import CONFIG, CORRECT, show

# Keys and numbers of mlx-lm's scaling_config; empty: no scaling.
Scaling = tuple[tuple[str, str | int | float], ...]

DEFAULT_THETA = 10_000.0  # DbrxConfig's default
_KEEP = (
    "keep the one that the model was trained with, in a copy of the checkpoint's directory "
    "(for DBRX 500000: transformers 5 reads and writes 10000 beside it)"
)
# The numbers of each type with their defaults (None: required). Yarn's defaults are those of its paper, as in
# transformers and mlx-lm.
_NUMBERS: dict[str, dict[str, float | None]] = {
    "default": {"factor": 1.0},
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
    "yarn": {"factor": None, "beta_fast": 32, "beta_slow": 1},
}
_COMMON = {"rope_theta", "partial_rotary_factor", "type", "rope_type"}


def read_rope(config: Mapping[str, Any], max_seq_len: int) -> tuple[float, Scaling]:
    """Return (theta, scaling) of a config whose attn_config is an object. Raises CheckpointError."""
    tables = dict(_find_tables(config))
    theta = _read_theta(config, tables)
    for where in ({"": config, "attn_config": config["attn_config"]} | tables).items():
        _check_partial(*where)
    scalings = {where: _read_scaling(where, table, theta, max_seq_len) for where, table in tables.items()}
    if len(set(scalings.values())) > 1:
        (one, _), (other, _) = _differing(scalings)
        raise CheckpointError(
            f"{CONFIG}: {one} is {show(tables[one])} and {other} is {show(tables[other])}; a model has one of them",
            hint=CORRECT,
        )
    return theta, next(iter(scalings.values()), ())


def _find_tables(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, holder in (("attn_config.", config["attn_config"]), ("", config)):
        for key in ("rope_parameters", "rope_scaling"):
            table = holder.get(key)
            if table is None or table == {}:
                continue
            if not isinstance(table, Mapping):
                raise CheckpointError(f"{CONFIG}: {place}{key} should be an object, it is {show(table)}", hint=CORRECT)
            yield place + key, table


def _read_theta(config: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> float:
    given = {
        "attn_config.rope_theta": config["attn_config"].get("rope_theta"),
        **{f"{where}.rope_theta": table.get("rope_theta") for where, table in tables.items()},
        "rope_theta": config.get("rope_theta"),
    }
    thetas = {where: _number(where, value) for where, value in given.items() if value is not None}
    if len(set(thetas.values())) > 1:
        (one, first), (other, second) = _differing(thetas)
        raise CheckpointError(
            f"{CONFIG}: {one} is {first:.12g} and {other} is {second:.12g}; a model has one of them", hint=_KEEP
        )
    return next(iter(thetas.values()), DEFAULT_THETA)


def _differing(values: Mapping[str, Any]) -> tuple[tuple[str, Any], tuple[str, Any]]:
    first, *others = values.items()
    return first, next(other for other in others if other[1] != first[1])


def _check_partial(where: str, holder: Mapping[str, Any]) -> None:
    value = holder.get("partial_rotary_factor")
    if value is not None and (isinstance(value, bool) or value != 1):
        raise CheckpointError(
            f"{CONFIG}: {where and where + '.'}partial_rotary_factor is {show(value)}: moectl runs 1 only",
            hint="moectl cannot run a model that was trained with it",
        )


def _read_scaling(where: str, table: Mapping[str, Any], theta: float, max_seq_len: int) -> Scaling:
    kind = _read_type(where, table)
    given = {key: value for key, value in table.items() if key not in _COMMON and value is not None}
    known = {**_NUMBERS[kind]}
    if kind in ("llama3", "yarn"):
        known["original_max_position_embeddings"] = max_seq_len
    if kind == "yarn" and given.get("truncate") is True:
        del given["truncate"]  # mlx-lm's own behaviour
    for key, value in given.items():
        if key not in known:
            raise _unsupported(f"{where}.{key} is {show(value)}")
    numbers: dict[str, float] = {}
    for key, default in known.items():
        value = given.get(key, default)
        if value is None:
            raise CheckpointError(f"{CONFIG}: {where} of type {kind} has no {key}", hint=CORRECT)
        numbers[key] = _number(f"{where}.{key}", value)
    return _settle(where, kind, numbers, theta)


def _settle(where: str, kind: str, numbers: dict[str, float], theta: float) -> Scaling:
    if kind == "default":
        if numbers["factor"] != 1:
            raise _unsupported(f"{where}.factor is {numbers['factor']:.12g} without a type of scaling")
        return ()
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise _unsupported(f"{where}.low_freq_factor is {numbers['low_freq_factor']:.12g}, not below high_freq_factor")
    if kind == "yarn" and theta <= 1:
        raise _unsupported(f"rope_theta is {theta:.12g} and {where}.rope_type yarn")
    return (("rope_type", kind), *numbers.items())


def _read_type(where: str, table: Mapping[str, Any]) -> str:
    kinds = {key: table[key] for key in ("rope_type", "type") if table.get(key) is not None}
    if len(set(map(show, kinds.values()))) > 1:
        raise CheckpointError(
            f"{CONFIG}: {where}.rope_type is {show(kinds['rope_type'])} and its type is {show(kinds['type'])}",
            hint=CORRECT,
        )
    for key, kind in kinds.items():
        if not isinstance(kind, str) or kind not in _NUMBERS:
            raise _unsupported(f"{where}.{key} is {show(kind)}")
    return next(iter(kinds.values()), "default")


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"{CONFIG}: {what}: moectl does not support it",
        hint="moectl scales the rotary embedding in the ways linear, llama3 and yarn, as transformers does by default",
    )


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{CONFIG}: {where} should be a positive number, it is {show(value)}", hint=CORRECT)
    return float(value)
