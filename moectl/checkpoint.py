"""Open a DBRX checkpoint, a directory or a Hub repository, and show every layout under one set of canonical names.

It reads headers, never weights; it writes nothing but what huggingface_hub downloads. Canonical names are mlx-lm's:
one matrix per expert, `transformer.blocks.{i}.ffn.experts.{e}.{w1,v1,w2}.weight`, shape (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """Where the bytes of one canonical tensor lie."""

    name: str  # canonical
    file: str  # name of the file within the checkpoint
    dtype: str  # in safetensors' spelling: BF16, F16, F32, U32, U8 …
    shape: tuple[int, ...]  # as stored
    offset: int  # of the first byte, from the start of the file
    transposed: bool = False  # stored (in, out) although canonical is (out, in): w2 of the fused layout
