"""Read parts of stored tensors into MLX arrays: the bytes that are wanted and no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product

import mlx.core as mx

from moectl.errors import CheckpointError
from moectl.model.regions import Region
from moectl.shards.source.sources import explain_unreadable, fill
from moectl.shards.source.tensors import StoredTensor
from moectl.shards.trace.traced import ANOTHER_COPY, Form, Stored, form_of

# As `mx.load` takes them: MLX has no 8-bit floats of its own, and keeps their bytes.
_TYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}

_SPELLINGS = {dtype: name for name, dtype in reversed(_TYPES.items())}


def spell(dtype: mx.Dtype) -> str:
    """Return a type in safetensors' spelling."""
    return _SPELLINGS[dtype]


def name_stored(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """Return an expression for each stored tensor. Raises CheckpointError for a type that MLX does not read."""
    return {name: Stored(name, _form(name, tensor)) for name, tensor in stored.items()}


def _form(name: str, tensor: StoredTensor) -> Form:
    try:
        return form_of(tensor.shape, _TYPES[tensor.dtype])
    except KeyError:
        raise CheckpointError(
            f"{name} is stored as {tensor.dtype}, and MLX does not read that", hint=ANOTHER_COPY
        ) from None


class StoredReader:
    """Reads regions of stored tensors. `open_file` returns a descriptor of a file of the checkpoint."""

    def __init__(self, stored: Mapping[str, StoredTensor], open_file: Callable[[str], int]) -> None:
        self._stored = stored
        self._open = open_file
        self.bytes_read = 0

    def __call__(self, name: str, dtype: mx.Dtype, region: Region) -> mx.array:
        """Return a region of a stored tensor, its elements taken as of `dtype`, which has their size."""
        tensor = self._stored[name]
        shape = tuple(b - a for a, b in region)
        size, item = math.prod(shape), dtype.size
        array = mx.zeros((size * item,), mx.uint8)
        if size:
            mx.eval(array)
            view = memoryview(array).cast("B")  # type: ignore[arg-type]  # its stubs do not tell of the buffer protocol
            axis = len(shape)  # of those after it, all is read: they are one run of bytes
            while axis and shape[axis:] == tensor.shape[axis:]:
                axis -= 1
            run = math.prod(shape[axis:]) * item
            strides = [math.prod(tensor.shape[i + 1 :]) * item for i in range(len(shape))]
            base = tensor.offset + sum(a * s for (a, _), s in zip(region[axis:], strides[axis:], strict=True))
            outer = product(*[range(a * s, b * s, s) for (a, b), s in zip(region[:axis], strides[:axis], strict=True)])
            try:
                fd = self._open(tensor.file)
            except OSError as error:
                raise explain_unreadable(tensor.file, error) from error
            for number, starts in enumerate(outer):
                fill(fd, tensor.file, base + sum(starts), [view[number * run : (number + 1) * run]])
            self.bytes_read += size * item
        return array.view(dtype).reshape(shape)
