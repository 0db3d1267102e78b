"""Say in which format a checkpoint stores its weights, and give every family's `sanitize` what it can read.

mlx-lm reads block-scaled FP8 in few of its model files and packed int4 in two. Here both are unpacked by name before
`sanitize` runs, for all families. Formats that neither reads are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from moectl.errors import CheckpointError
from moectl.model.config_keys import CORRECT, show
from moectl.shards.look.exceptions import find_own_file
from moectl.shards.source.tensors import MODES
from moectl.shards.trace.traced import ANOTHER_COPY, Expression, Stored, form_of, record

_BLOCK = (128, 128)  # of FP8 scales, where config.json is silent
_FLOATS = (mx.bfloat16, mx.float16, mx.float32)
_RUN = 32  # elements that MLX's CPU kernels of the fp modes take at once
_MX = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


@dataclass(frozen=True, slots=True)
class Format:
    """How a checkpoint stores its weights: `kind` is plain, mlx, fp8 or packed."""

    kind: str
    table: Mapping[str, Any] | None = None  # config.json's `quantization`, as mlx-lm makes it up for others' formats
    block: tuple[int, int] = _BLOCK
    int4: bool = False


def read_format(config: Mapping[str, Any]) -> Format:
    """Return the format that config.json describes. Raises CheckpointError for one that is not read."""
    if config.get("quantize_activations"):
        raise _refused("with quantised activations (quantize_activations)")
    own = _object(config, "quantization")
    raw = (
        own or _object(config, "quantization_config") or _object(_object(config, "text_config"), "quantization_config")
    )
    if not raw:
        return Format("plain")
    method = raw.get("quant_method")
    if own or method is None:
        if not isinstance(raw.get("bits"), int) or not isinstance(raw.get("group_size"), int):
            raise CheckpointError("config.json: quantization has no bits or no group_size", hint=CORRECT)
        _check_mode(raw)
        own_file = find_own_file(config.get("model_type"))
        return Format("mlx", own_file.rename_table(raw) if own_file else raw)
    readers = {"fp8": _read_fp8, "compressed-tensors": _read_compressed, "modelopt": _read_modelopt}
    if not isinstance(method, str) or method not in {*readers, *_MX}:
        raise _refused(f"by {method!r}")
    return readers[method](raw) if method in readers else Format("packed", _MX[method])


def _check_mode(raw: Mapping[str, Any]) -> None:
    """Raise CheckpointError for numbers that MLX does not have; mlx-lm would take those of the tensors in silence."""
    mode = raw.get("mode") or "affine"
    groups, widths = MODES.get(mode, ((), ())) if isinstance(mode, str) else ((), ())
    if raw["bits"] not in widths or raw["group_size"] not in groups:
        said = {key: raw[key] for key in ("bits", "group_size", "mode") if key in raw}
        raise CheckpointError(f"config.json: quantization is {show(said)}, and MLX has no such mode", hint=CORRECT)


def unpack(tensors: Mapping[str, Stored], form: Format) -> dict[str, Expression]:
    """Return what `sanitize` is given: FP8 blocks as bfloat16, packed int4 as MLX's weight, scales and biases."""
    if form.kind == "fp8":
        return _unpack_fp8(tensors, form.block)
    return _unpack_int4(tensors) if form.int4 else dict(tensors)


def dequantise_blocks(weight: mx.array, scale: mx.array, block: tuple[int, int], skip: tuple[int, int]) -> mx.array:
    """Return FP8 values times the scale of their block, as mlx-lm computes it.

    `weight` may be a part: `skip` says how many rows and columns of the first block come before it.
    """
    for axis, size, first in ((-2, block[0], skip[0]), (-1, block[1], skip[1])):
        if scale.shape[axis] > 1:
            scale = mx.repeat(scale, size, axis)
            part = slice(first, first + weight.shape[axis])
            scale = scale[..., part, :] if axis == -2 else scale[..., part]
    return (mx.from_fp8(weight, dtype=mx.bfloat16) * scale).astype(mx.bfloat16)


def quantise(weight: mx.array, group_size: int, bits: int, mode: str) -> tuple[mx.array, ...]:
    """Return `mx.quantize` of a weight or of a part of it."""
    rows = weight.shape[0]
    if weight.size % _RUN:  # nvfp4's groups of 16, an odd number of them: MLX's CPU kernel needs a pair
        weight = mx.concatenate([weight, weight[-1:]])
    return tuple(p[:rows] for p in mx.quantize(weight, group_size=group_size, bits=bits, mode=mode))


def _unpack_fp8(tensors: Mapping[str, Stored], block: tuple[int, int]) -> dict[str, Expression]:
    made: dict[str, Expression] = dict(tensors)
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if not name.endswith(".weight_scale_inv") or weight is None:
            continue
        if weight.dtype != mx.uint8 or scale.dtype not in _FLOATS or weight.ndim < 2:
            continue
        *lead, rows, columns = weight.shape
        one = (1,) * weight.ndim
        if scale.size == 1:
            given = scale if scale.shape == one else record(mx.reshape, scale, one)
        elif scale.shape == (*lead, -(-rows // block[0]), -(-columns // block[1])):
            given = scale
        else:
            continue  # not in blocks: `sanitize` may know better
        made[name.removesuffix("_scale_inv")] = record(dequantise_blocks, weight, given, block, (0, 0))
        del made[name]
    return made


def _unpack_int4(tensors: Mapping[str, Stored]) -> dict[str, Expression]:
    made: dict[str, Expression] = {}
    for name, node in tensors.items():
        base, _, part = name.rpartition(".")
        if part in ("weight_zero_point", "weight_g_idx"):
            raise _refused(f"by compressed-tensors with {part}")
        if part == "weight_packed":
            if (scale := tensors.get(f"{base}.weight_scale")) is None:
                raise CheckpointError(
                    f"the checkpoint has no tensor {base}.weight_scale", hint="complete the download of this checkpoint"
                )
            made[f"{base}.weight"] = Stored(name, form_of(node.shape, mx.uint32))
            made[f"{base}.scales"] = scale
            made[f"{base}.biases"] = record(mx.array.__rmul__, scale, -8)
        elif part not in ("weight_scale", "weight_shape") or f"{base}.weight_packed" not in tensors:
            made[name] = node
    return made


def _read_fp8(raw: Mapping[str, Any]) -> Format:
    size = raw.get("weight_block_size") or _BLOCK
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CheckpointError(
            f"config.json: weight_block_size is {size!r}, and two numbers are needed", hint=ANOTHER_COPY
        )
    if raw.get("scale_fmt") == "ue8m0" and list(size) == [32, 32]:  # it is MXFP8, and stays packed
        return Format("packed", _MX["mxfp8"])
    return Format("fp8", block=(size[0], size[1]))


def _read_compressed(raw: Mapping[str, Any]) -> Format:
    layout = raw.get("format")
    if layout == "mxfp4-pack-quantized":
        return Format("packed", _MX["mxfp4"])
    if layout != "pack-quantized":
        raise _refused(f"by compressed-tensors in the format {layout!r}")
    groups = _object(raw, "config_groups")
    for name in groups:
        group = _object(groups, name)
        weights = _object(group, "weights")
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "actorder": None}
        for key, value in wanted.items():
            if weights.get(key, value) != value:
                raise _refused(f"by compressed-tensors with {name}.weights.{key} = {weights[key]!r}")
        if group.get("input_activations"):
            raise _refused(f"by compressed-tensors with quantised activations ({name}.input_activations)")
        if weights.get("group_size", 32) not in (32, 64, 128):
            raise _refused(f"by compressed-tensors in groups of {weights['group_size']}")
    return Format("packed", {"group_size": 32, "bits": 4, "mode": "affine"}, int4=True)


def _read_modelopt(raw: Mapping[str, Any]) -> Format:
    settings = _object(raw, "quantization") or raw
    if settings.get("quant_algo") != "NVFP4":
        raise _refused(f"by modelopt as {settings.get('quant_algo')!r}")
    return Format("packed", {"group_size": settings.get("group_size", 16), "bits": 4, "mode": "nvfp4"})


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return what config.json has under a key, empty where it has nothing. Raises CheckpointError for no object."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json: {key} should be an object, it is {show(value)}", hint=CORRECT)
    return value


def _refused(how: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: the checkpoint is quantised {how}, which moectl does not read", hint=ANOTHER_COPY
    )
