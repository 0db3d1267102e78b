"""What evaluates a rank's caches also sends its state: at prefill nothing else is evaluated."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ChunkedKVCache, make_prompt_cache

from moectl.engine.network.stages import _tie, keep, make_stage
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.ways import look
from tests.support.families import PROMPT, config_of, make_whole


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


class Neighbours:
    """Two neighbours of a stage of a pipeline; notes which arrays they got evaluated, and gives what is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.got_evaluated: list[bool] = []
        self.gave: list[mx.array] = []
        monkeypatch.setattr(mx.distributed, "send", self.send)
        monkeypatch.setattr(mx.distributed, "recv", self.receive)

    def send(self, x: mx.array, to: int, *, group: Any) -> mx.array:
        self.got_evaluated.append(is_evaluated(x))
        return x

    def receive(self, shape: Any, dtype: mx.Dtype, source: int, *, group: Any) -> mx.array:
        self.gave.append(mx.zeros(shape, dtype) + 1)
        return self.gave[-1]


def is_evaluated(x: mx.array) -> bool:
    drawing = io.StringIO()
    mx.export_to_dot(drawing, x)
    return "->" not in drawing.getvalue()


@pytest.mark.parametrize("tokens", [4, 1])
def test_a_chunk_is_received_and_sent_by_itself(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for another stage's chunk is no part of what a GPU computes; a single token goes on as it is."""
    neighbours = Neighbours(monkeypatch)
    model, flow = make_whole("llama"), look(make_skeleton(config_of("llama"))).flow
    assert flow is not None
    make_stage(model, flow, [(0, 1), (1, 2), (2, len(model.layers))], 1, object())
    model(mx.array([PROMPT[:tokens]]), cache=make_prompt_cache(model))
    assert neighbours.got_evaluated == [tokens > 1]
    assert [is_evaluated(x) for x in neighbours.gave] == [tokens > 1]
