"""Toy models over two ranks: sums in the right place, matrices of two, biases once; and what is refused is wrong."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from moectl.engine.network.parallel import cut, divide, take
from moectl.model.ownership import Holding, hold
from moectl.model.regions import Division, Pieces, Role
from moectl.shards.look.units import divisions_of
from moectl.shards.look.ways import look
from tests.support.fake_group import run_ranks
from tests.support.families import is_equal
from tests.support.toy import HEADS, Toy, make_toy


def make_whole(odd: str) -> Toy:
    mx.random.seed(3)
    model = Toy(odd)
    model.load_weights([(n, 0.2 * mx.random.normal(a.shape)) for n, a in tree_flatten(model.parameters())])
    return model


def run(model: Any) -> list[mx.array]:
    caches = make_prompt_cache(model)
    found: list[mx.array] = [model(mx.array([tokens]), cache=caches)[:, -1] for tokens in ([3, 1, 4, 1], [5])]
    mx.eval(found)
    return found


def run_divided(odd: str, split: str, shares: list[float]) -> list[list[mx.array]]:
    parts = look(make_toy(odd)).parts

    def work(rank: int, group: Any) -> list[mx.array]:
        model = make_whole(odd)
        holdings = hold(divisions_of(model, parts, split), shares, rank)
        cut(model, holdings)
        divide(model, parts, holdings, group)
        return run(model)

    return run_ranks(len(shares), work)


@pytest.mark.parametrize("shares", [[1, 1], [1, 100], [1, 2, 1]], ids=str)
@pytest.mark.parametrize(
    ("odd", "split"),
    [
        ("", "hidden"),
        ("", "tensor"),
        ("fused", "hidden"),
        ("interleaved", "tensor"),
        ("squared", "hidden"),
        ("keys", "tensor"),
    ],
)
def test_all_ranks_compute_what_the_whole_does(odd: str, split: str, shares: list[float]) -> None:
    whole = run(make_whole(odd))
    for found in run_divided(odd, split, shares):
        same, off = is_equal(found, whole)
        assert same, off


@pytest.mark.parametrize("odd", ["across", "residual"])
def test_what_is_refused_would_be_wrong(odd: str) -> None:
    assert look(make_toy(odd)).ways["hidden"] is not None
    _, off = is_equal(run_divided(odd, "hidden", [1, 1])[0], run(make_whole(odd)))
    assert off > 0.01


def test_a_vector_with_one_number_per_head_is_divided() -> None:
    parts = look(make_toy()).parts
    model = make_whole("")
    sinks = model.layers[0].attn.sinks
    holdings = hold(divisions_of(model, parts, "tensor"), [1, 3], 1)
    cut(model, holdings)
    assert model.layers[0].attn.sinks.tolist() == sinks[HEADS // 4 :].tolist()


def test_a_bias_after_the_sum_is_one_ranks() -> None:
    division, bias = Division(-1, Pieces(Role.HIDDEN, 8)), mx.ones((3,))
    assert take("bias", bias, Holding(division, ((0, 4),), adds=True)).tolist() == [1, 1, 1]
    assert take("bias", bias, Holding(division, ((4, 8),), adds=False)).tolist() == [0, 0, 0]
