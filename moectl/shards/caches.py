"""What a model's caches can do: forget their last tokens, and take several rows. Found by looking at a whole model.

A rank of a pipeline has some of the caches only, and all ranks have to decide alike: so nothing is asked of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlx_lm.models.cache import KVCache


def can_trim(caches: Iterable[Any]) -> bool:
    """Whether all caches can forget any number of their last tokens, always.

    A window can do so until it is full, and a state never: mlx-lm's `is_trimmable` says so too late.
    """
    return all(type(part) is KVCache for cache in caches for part in list_parts(cache))


def can_batch(caches: Iterable[Any]) -> bool:
    """Whether mlx-lm's batch generator takes all caches."""
    return all(hasattr(part, "merge") for cache in caches for part in list_parts(cache))


def list_parts(cache: Any) -> Iterator[Any]:
    """Yield the caches of which a layer's consists: itself, or those in a list."""
    inner = getattr(cache, "caches", None)
    if inner is None:
        yield cache
    else:
        for part in inner:
            yield from list_parts(part)
