"""A profile counts the choices of experts in models of any family, and whose work they are."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moectl.engine.network import exchange
from moectl.engine.network.experts import install
from moectl.engine.network.parallel import cut, divide
from moectl.engine.network.routing import count_experts
from moectl.engine.profile import profile
from moectl.engine.protocol import Profile, Profiled
from moectl.model.placement import Placement, make_placement
from moectl.model.routing import Routing
from moectl.shards.look.hooks import hooked
from moectl.shards.look.outline import outline
from moectl.shards.look.routers import find_stacks
from moectl.shards.look.units import divisions_of
from tests.support.fake_group import run_ranks
from tests.support.families import config_of, look_at, make_whole

TOKENS, STEPS = [3, 11, 5, 7, 2, 9, 4, 8, 6, 1, 12, 13], 4


pytestmark = pytest.mark.usefixtures("uncompiled")


def run_profile(family: str, split: str, shares: list[float], replicas: int = 1) -> tuple[Placement, list[Profiled]]:
    skeleton, found = look_at(family)
    placement = make_placement(
        outline(skeleton, found, config_of(family)), split, len(shares), shares=shares, replicas=replicas
    )

    def run(rank: int, group: Any) -> Profiled:
        model = make_whole(family)
        holdings = placement.hold(divisions_of(model, found.parts, split), rank)
        cut(model, holdings)
        divide(model, found.parts, holdings, group, rank=rank, held=placement.held)
        install(model)
        stream = mx.default_stream(mx.default_device())
        *_, told = profile(
            model,
            Profile(1, TOKENS, STEPS),
            placement=placement,
            rank=rank,
            leads=rank == 0,
            prefill_step=4,
            stream=stream,
        )
        assert isinstance(told, Profiled)
        return told

    return placement, run_ranks(len(shares), run)


def choices(family: str) -> dict[int, np.ndarray[Any, Any]]:
    """Return what an undivided model's layers choose for all tokens, (T, K)."""
    model, seen = make_whole(family), dict[int, np.ndarray[Any, Any]]()

    def note(layer: int) -> Any:
        def hook(call: Any, x: mx.array, indices: mx.array, *args: Any) -> Any:
            seen[layer] = np.array(indices).astype(int).reshape(-1, indices.shape[-1])
            return call(x, indices, *args)

        return hook

    with hooked([(stack.module, note(stack.layer)) for stack in find_stacks(model)]):
        mx.eval(model(mx.array([TOKENS])))
    return seen


@pytest.mark.parametrize(
    ("family", "split", "shares", "replicas"),
    [
        ("mixtral", "hidden", [1, 3], 1),
        ("mixtral", "experts", [1, 3], 1),
        ("mixtral", "experts", [1, 1, 1], 2),
        ("klear", "hidden", [1, 1], 1),
        ("gpt_oss", "tensor", [1, 1], 1),
        ("nemotron_h", "experts", [1, 1], 1),
    ],
)
def test_choices_and_work_are_counted(family: str, split: str, shares: list[float], replicas: int) -> None:
    family = {"klear": "Klear"}.get(family, family)
    placement, told = run_profile(family, split, shares, replicas)
    experts, chosen = count_experts(placement.structure), choices(family)
    expected = [[int((chosen[n] == e).sum()) for e in range(count)] for n, count in enumerate(experts)]
    assert [rank.chosen for rank in told] == [expected] * len(shares)
    assert [] in expected or family != "Klear"
    top_k = placement.structure.top_k
    assert sum(rank.own_experts for rank in told) == pytest.approx(top_k)
    if split != "experts":
        assert told[0].own_experts == pytest.approx(top_k * shares[0] / sum(shares))
    elif replicas == 1:
        mine = np.concatenate([np.isin(rows, placement.experts_of(0)).sum(axis=1) for rows in chosen.values()])
        assert told[0].own_experts == pytest.approx(mine.mean())
    assert all(rank.exchanges > 0 and rank.compute_s > 0 for rank in told)
    assert exchange._observer.get() is None
    Routing(family, len(TOKENS), top_k, tuple(map(tuple, told[0].chosen)))  # would refuse counts that do not add up


def test_a_dense_model_has_no_choices() -> None:
    _, told = run_profile("llama", "hidden", [1, 1])
    assert set(map(tuple, told[0].chosen)) == {()}
    assert (told[0].own_experts, told[0].busiest_experts) == (0, 0)
    assert told[0].exchanges > 0
