"""How many bytes a rank sends for each token that is generated: from the split, the shape and the type alone.

It is what `model.reduce` does over a ring, counted and not measured; prompts are not in it.
"""

from __future__ import annotations

from moectl.model.placement import Placement

GATHER_BELOW_BYTES = 64 * 1024  # as in `model.reduce`, which cannot be imported here: it needs mlx


def count_token_bytes(placement: Placement, dtype_bytes: int) -> int:
    """Return what one rank sends per token: the exchanges of all layers, without the step's few agreement words."""
    ranks = placement.world_size
    if ranks == 1:
        return 0
    row = placement.geometry.d_model * dtype_bytes
    if placement.split == "layers":
        return row  # one hand-over to the next rank
    # Small rows are gathered: each goes round to all others; large ones are reduced and spread in N parts.
    each = (ranks - 1) * row if row <= GATHER_BELOW_BYTES else 2 * (ranks - 1) * row // ranks
    return each * placement.geometry.n_layers * (2 if placement.split == "tensor" else 1)
