"""The tensors of a safetensors file as its header describes them, and the types that they may have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moectl.errors import CheckpointError, IntegrityError

_HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library's own limit
FLOATS = ("BF16", "F16", "F32")  # the types of weights that moectl reads
# In the reverse of the order in which the safetensors library writes tensors.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
# MLX's table of quantisation modes: (group sizes, bits).
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((32, 64, 128), (2, 3, 4, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file's header describes it; offset from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def item_bytes(dtype: str) -> int:
    """Return the size of one element; raises CheckpointError for a type that moectl does not read."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise CheckpointError(f"tensors of type {dtype} are not supported") from None


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
