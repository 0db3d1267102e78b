"""What a model's caches can do: forget their last tokens, and take several rows. Found by looking at a whole model.

A rank of a pipeline has some of the caches only, and all ranks have to decide alike: so nothing is asked of theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from moectl.shards.look.exceptions import ONE_ROW
from moectl.shards.look.hooks import uncompiled
from moectl.shards.look.skeleton import Skeleton

_ROWS = 2


def can_trim(caches: Iterable[Any]) -> bool:
    """Whether all caches can forget any number of their last tokens, always.

    A window can do so until it is full, and a state never: mlx-lm's `is_trimmable` says so too late.
    """
    return all(type(part) is KVCache for cache in caches for part in list_parts(cache))


def can_batch(skeleton: Skeleton) -> bool:
    """Whether mlx-lm's batch generator takes all caches, and the model takes caches of several rows.

    Some model files count tokens by themselves, as one number for all rows.
    """
    if skeleton.model_type in ONE_ROW:
        return False
    try:
        with uncompiled():
            rows = [make_prompt_cache(skeleton.model) for _ in range(_ROWS)]
            caches = [whole[0].merge(list(whole)) for whole in zip(*rows, strict=True)]
            for length in (_ROWS + 1, 1):
                skeleton.model(mx.zeros((_ROWS, length), dtype=mx.int32), cache=caches)
    except Exception:  # any code of a model file runs here
        return False
    return True


def list_parts(cache: Any) -> Iterator[Any]:
    """Yield the caches of which a layer's consists: itself, or those in a list."""
    inner = getattr(cache, "caches", None)
    if inner is None:
        yield cache
    else:
        for part in inner:
            yield from list_parts(part)
