"""The tensors of safetensors headers under canonical names, for every layout of DBRX, checked.

It reads only the headers of local files; `checkpoint` finds the files. Canonical names are mlx-lm's: one matrix per
expert, `transformer.blocks.{i}.ffn.experts.{e}.{w1,v1,w2}.weight`, (out, in).

Layouts: *fused* (experts.mlp.w1 of (experts·hidden, d_model), w2 not transposed), *v2*
(experts.mlp.0.w1.weight) and *mlx* (experts.0.w1.weight, quantised or not).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.errors import CheckpointError, IntegrityError
from moectl.model.config_keys import CORRECT, show
from moectl.model.geometry import PROJECTIONS, Geometry, block, expert_name
from moectl.model.structure import Quantization

_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit
FLOATS = ("BF16", "F16", "F32")  # the types of weights that moectl reads
# In the reverse of the order in which the safetensors library writes tensors.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
}
# MLX's table of quantisation modes: (group sizes, bits).
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}
_QUANTIZATION_KEYS = ("bits", "group_size", "mode", "quant_method")
_LAYOUTS = {
    "fused": re.compile(r"transformer\.blocks\.\d+\.ffn\.experts\.mlp\.(w1|v1|w2)"),
    "v2": re.compile(r"transformer\.blocks\.\d+\.ffn\.experts\.mlp\.\d+\.(w1|v1|w2)\.weight"),
    "mlx": re.compile(r"transformer\.blocks\.\d+\.ffn\.experts\.\d+\.(w1|v1|w2)\.weight"),
}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """The place of one canonical tensor's bytes."""

    name: str  # canonical
    file: str  # name of the file within the checkpoint
    dtype: str  # in safetensors' spelling: BF16, F16, F32, U32, U8 …
    shape: tuple[int, ...]  # as stored
    offset: int  # of the first byte, from the start of the file
    transposed: bool = False  # stored (in, out) although canonical is (out, in): w2 of the fused layout

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file's header describes it; offset from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def name_tensors(
    stored: Mapping[str, StoredTensor], geometry: Geometry, config: Mapping[str, Any]
) -> Iterator[SourceTensor]:
    """Yield every tensor of the model, checked. Raises CheckpointError when one is missing or wrong."""
    layout = _find_layout(stored)
    _check_overrides(config, geometry)
    missing: list[str] = []
    expected: set[str] = set()
    for raw, name, shape in _expected(geometry, layout):
        place = stored.get(raw)
        stem = raw.removesuffix("weight")
        expected |= {raw, f"{stem}scales", f"{stem}biases"}
        if place is None:
            missing.append(raw)
            if len(missing) > 999:  # a wrong config.json must not make this loop long
                break
        elif layout == "fused" and ".ffn.experts." in raw:
            yield from _split_fused(raw, place, geometry)
        elif place.dtype == "U32" or _scales(raw) in stored:
            yield from _quantized(raw, name, shape, stored, config)
        else:
            yield _plain(raw, name, shape, place)
    quantization = read_quantization(config)
    if quantization is not None and not missing and not any(n.endswith(".scales") for n in stored):
        raise CheckpointError(
            f"config.json says that it is quantised ({quantization.bits}-bit {quantization.mode}), and no tensor is",
            hint="remove 'quantization' from config.json if the weights are whole",
        )
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"the checkpoint has no tensor {missing[0]}{more}", hint="it is incomplete, or not DBRX")
    _refuse_more(stored, expected)


def _refuse_more(stored: Mapping[str, StoredTensor], expected: set[str]) -> None:
    """Raise CheckpointError for a tensor that the network would not use: a bias, or an additional layer."""
    for name in sorted(stored.keys() - expected):
        # Tables of old rotary embeddings are computed, not read.
        if name.startswith(("transformer.", "lm_head.")) and not name.endswith(".inv_freq"):
            raise CheckpointError(
                f"the checkpoint has a tensor {name}, and config.json describes a model without it",
                hint=CORRECT,
            )


def item_bytes(dtype: str) -> int:
    """Return the size of one element; raises CheckpointError for a type that DBRX checkpoints do not have."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise CheckpointError(f"tensors of type {dtype} are not supported") from None


def _find_layout(stored: Mapping[str, StoredTensor]) -> str:
    found = {kind: n for n in stored for kind, pattern in _LAYOUTS.items() if pattern.fullmatch(n)}
    if len(found) > 1:
        (one, a), (other, b), *_ = found.items()
        raise CheckpointError(f"the checkpoint mixes two layouts: {a} is {one}, {b} is {other}")
    if not found:
        raise CheckpointError(
            f"the checkpoint has no experts in a layout that moectl reads, such as {expert_name(0, 0, 'w1')}"
        )
    return next(iter(found))


def _expected(geometry: Geometry, layout: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (raw name, canonical name, canonical shape); a fused tensor keeps its raw name."""
    for name, shape in geometry.outer_shapes().items():
        yield name, name, shape
    for i in range(geometry.n_layers):
        for name, shape in geometry.layer_shapes(i).items():
            yield name, name, shape
        if layout == "fused":
            for p in PROJECTIONS:
                raw = f"{block(i)}.ffn.experts.mlp.{p}"
                yield raw, raw, ()
            continue
        for e in range(geometry.n_experts):
            for p, shape in geometry.expert_shapes.items():
                name = expert_name(i, e, p)
                yield name.replace(".experts.", ".experts.mlp.") if layout == "v2" else name, name, shape


def _split_fused(raw: str, place: StoredTensor, geometry: Geometry) -> Iterator[SourceTensor]:
    """Cut (experts·hidden, d_model) into one matrix per expert: contiguous byte ranges."""
    _require_float(raw, place)
    rows, columns = geometry.ffn_hidden, geometry.d_model
    _require_shape(raw, place.shape, (geometry.n_experts * rows, columns))
    step = rows * columns * ITEM_BYTES[place.dtype]
    layer, projection = int(raw.split(".")[2]), raw.rsplit(".", 1)[1]
    for e in range(geometry.n_experts):
        name = expert_name(layer, e, projection)
        offset = place.offset + e * step
        yield SourceTensor(name, place.file, place.dtype, (rows, columns), offset, transposed=projection == "w2")


def _plain(raw: str, name: str, shape: tuple[int, ...], place: StoredTensor) -> SourceTensor:
    _require_float(raw, place)
    # Converted checkpoints store w2 as (out, in) or (in, out); a square one counts as (out, in).
    flipped = name.endswith(".w2.weight") and place.shape != shape and place.shape == shape[::-1]
    _require_shape(raw, place.shape, shape[::-1] if flipped else shape)
    return SourceTensor(name, place.file, place.dtype, place.shape, place.offset, transposed=flipped)


def _quantized(
    raw: str, name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Iterator[SourceTensor]:
    """Yield weight, scales and (affine) biases of a matrix that MLX has quantised."""
    q = quantization_of(config, name)
    if q is None:
        raise CheckpointError(f"{raw} is quantised, and config.json does not say how")
    if len(shape) != 2 or shape[1] % q.group_size or shape[1] * q.bits % 32:
        raise CheckpointError(f"{raw} of shape {shape} cannot be quantised with {q.bits} bits, group {q.group_size}")
    groups = (shape[0], shape[1] // q.group_size)
    parts = {"weight": (shape[0], shape[1] * q.bits // 32), "scales": groups}
    if q.mode == "affine":
        parts["biases"] = groups
    for part, expected in parts.items():
        full = raw.removesuffix("weight") + part
        place = stored.get(full)
        if place is None:
            raise CheckpointError(f"the checkpoint has no tensor {full}", hint="it is incomplete")
        _require_shape(full, place.shape, expected)
        allowed = ("U32",) if part == "weight" else FLOATS if q.mode == "affine" else ("U8",)
        if place.dtype not in allowed:
            raise CheckpointError(f"{full} is stored as {place.dtype}; {q.mode} quantisation needs {allowed[0]}")
        yield SourceTensor(name.removesuffix("weight") + part, place.file, place.dtype, place.shape, place.offset)


def _require_float(raw: str, place: StoredTensor) -> None:
    if place.dtype not in FLOATS:
        raise CheckpointError(
            f"{raw} is stored as {place.dtype}; moectl reads {', '.join(FLOATS)} and what MLX has quantised"
        )


def _require_shape(raw: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"{raw} has shape {shape}; config.json asks for {expected}")


def _scales(name: str) -> str:
    return name.removesuffix("weight") + "scales"


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Return how config.json says that MLX has quantised the weights. Raises CheckpointError for any other way."""
    raw = quantization_table(config)
    if not raw:
        return None
    for key, value in raw.items():
        if key not in _QUANTIZATION_KEYS and value is not None and not isinstance(value, bool | Mapping):
            raise _not_ours(f"{key} is {show(value)}")
    return _parse_quantization("", raw)


def quantization_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object that says how weights are quantised, empty where they are not. Raises CheckpointError."""
    found = {key: config[key] for key in ("quantization", "quantization_config") if config.get(key) not in (None, {})}
    for key, raw in found.items():
        if isinstance(raw, Mapping) and raw.get("quant_method"):
            raise CheckpointError(
                f"config.json: {key}.quant_method: the checkpoint is quantised with {raw['quant_method']!r}; "
                "moectl reads 16-bit checkpoints and those that MLX has quantised",
                hint="start from the 16-bit checkpoint: moectl shard --q-bits 4",
            )
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"config.json: {key} should be an object, it is {show(raw)}", hint=CORRECT)
    if len(found) == 2 and found["quantization"] != found["quantization_config"]:
        raise CheckpointError(
            "config.json: quantization and quantization_config differ",
            hint=CORRECT,
        )
    return next(iter(found.values()), {})


def quantization_of(config: Mapping[str, Any], name: str) -> Quantization | None:
    """Return a module's own quantisation where config.json overrides the general one, as mlx-lm reads it."""
    raw = quantization_table(config)
    module = name.removesuffix(".weight")
    own = raw.get(module)
    if own is False:
        raise CheckpointError(f"config.json says that {module} is not quantised, and its weights are", hint=CORRECT)
    if isinstance(own, Mapping):
        return _parse_quantization(f"{module}.", own)
    return _parse_quantization("", raw) if raw else None


def _check_overrides(config: Mapping[str, Any], geometry: Geometry) -> None:
    """Raise CheckpointError where config.json quantises a module that the model does not have."""
    own = {key for key, value in quantization_table(config).items() if isinstance(value, bool | Mapping)}
    if own:
        own -= {name.removesuffix(".weight") for name, _ in geometry.checkpoint_shapes()}
    if own:
        raise _not_ours(f"it names {min(own)}, and the model has no such part")


def _parse_quantization(where: str, raw: Mapping[str, Any]) -> Quantization:
    """Read bits, group_size and mode, whose path is `where`. As in mlx-lm, all of them come from there."""
    bits, group, mode = raw.get("bits"), raw.get("group_size"), raw.get("mode") or "affine"
    groups, widths = MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    for key, value, allowed in (("mode", mode, tuple(MODES)), ("bits", bits, widths), ("group_size", group, groups)):
        if isinstance(value, bool | float) or value not in allowed:
            can = " or ".join(map(show, allowed))
            raise _not_ours(f"{where}{key} is {show(value)}, which is not one of MLX's: {can}")
    if where:
        for key, value in raw.items():
            if key not in _QUANTIZATION_KEYS and value not in (None, False):
                raise _not_ours(f"{where}{key} is {show(value)}, which moectl does not know")
    return Quantization(int(bits), int(group), mode)  # type: ignore[arg-type]


def _not_ours(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: quantization: {what}", hint="start from the 16-bit checkpoint: moectl shard --q-bits 4"
    )


def read_header(path: Path, file: str) -> dict[str, StoredTensor]:
    """Return the tensors of a file: the safetensors library checks the header, this adds the byte offsets.

    Raises IntegrityError; `file` names the file in the result and in errors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = header_length(f.read(8), file, size)
            header = f.read(length)
        with safe_open(str(path), framework="numpy") as opened:
            names = list(opened.keys())
            info = json.loads(header)
            return {n: _place(file, info[n], 8 + length, size) for n in names}
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in reason or "too large" in reason or "too small" in reason:
            reason = f"its header does not fit its {size} bytes (truncated?)"
        raise _damaged(file, reason) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(file, f"its header is not valid: {error}") from None


def header_length(start: bytes, file: str, size: int) -> int:
    """Return the length of a safetensors file's header. Raises IntegrityError where it cannot be right."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length < 2:
        raise _damaged(file, "it has no header")
    if length > min(_HEADER_LIMIT_BYTES, size - 8):
        raise _damaged(file, f"its header claims {length} bytes of a file of {size}")
    return length


def _place(file: str, info: Mapping[str, Any], base: int, size: int) -> StoredTensor:
    begin, end = info["data_offsets"]
    dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
    nbytes = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    if not 0 <= begin <= end <= size - base or (nbytes and nbytes != end - begin):
        raise ValueError(f"bytes {begin} to {end} cannot hold {dtype} {shape}")
    return StoredTensor(file, dtype, shape, base + begin)


def _damaged(file: str, reason: str) -> IntegrityError:
    return IntegrityError(f"{file} is damaged: {reason}", hint="download it again")
