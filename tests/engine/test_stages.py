"""What evaluates a rank's caches also sends its state: at prefill nothing else is evaluated."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache

from moectl.engine.network.stages import _tie, keep
from tests.support.families import PROMPT, make_whole


def sends(cache: Any, sent: mx.array) -> bool:
    """Whether evaluating a cache's state takes `sent`."""
    drawing = io.StringIO()
    arrays = [array for _, array in tree_flatten(cache.state) if isinstance(array, mx.array)]
    mx.export_to_dot(drawing, *arrays, sent=sent)
    return '"sent" ->' in drawing.getvalue()


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mamba2", "qwen3_next", "deepseek_v32", "baichuan_m1"])
def test_a_caches_state_sends(family: str) -> None:
    model = make_whole(family)
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([PROMPT]), cache=caches), [cache.state for cache in caches])
    for cache in caches:
        sent = mx.zeros((1,)) + 1
        assert not sends(cache, sent)
        assert _tie(cache, sent)
        assert sends(cache, sent)


def test_a_chunked_caches_state_sends() -> None:
    cache, sent = ChunkedKVCache(8), mx.zeros((1,)) + 1
    cache.update_and_fetch(mx.ones((1, 1, 2, 4)), mx.ones((1, 1, 2, 4)))
    assert _tie(cache, sent)
    assert sends(cache, sent)


def test_an_empty_cache_cannot_send() -> None:
    assert not _tie(make_prompt_cache(make_whole("mixtral"))[0], mx.zeros((1,)))


def test_what_a_rank_does_not_need_takes_no_memory() -> None:
    model = make_whole("mixtral")
    kept = "model.norm.weight"
    before = mx.get_active_memory()
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    keep(model, {kept})
    assert before - mx.get_active_memory() > 0.9 * nbytes
    parameters = dict(tree_flatten(model.parameters()))
    assert mx.any(parameters[kept] != 0)
    assert not any(mx.any(array != 0).item() for name, array in parameters.items() if name != kept)
