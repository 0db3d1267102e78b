"""The choice of experts in models of any family: found, watched, dealt out, and taken from the first rank."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from moectl.engine.network.routing import count_experts, deal, dealt, follow_first_rank
from moectl.engine.network.witness import Witness, find_dissent
from moectl.errors import UsageError
from moectl.shards.look.hooks import hooked
from moectl.shards.look.outline import outline
from moectl.shards.look.routers import find_routers, find_stacks
from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.units import at
from moectl.shards.look.ways import look
from tests.support.families import PROMPT, config_of, is_equal, look_at, make_whole, run_greedily, run_split

SPARSE = (
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "nemotron_h",
    "gemma4_text",
    "llama4",
    "ernie4_5_moe",
    "dbrx",
)


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("family", SPARSE)
def test_every_stack_has_a_router(family: str) -> None:
    """What a router gives is all that the choice depends on."""
    skeleton, model = make_skeleton(config_of(family)), make_whole(family)
    routers = find_routers(skeleton)
    stacks = find_stacks(model)
    assert len(routers) == len(stacks) > 0
    seen: list[list[int]] = []

    def note(call: Any, x: mx.array, indices: mx.array, *args: Any) -> Any:
        seen.append(indices.reshape(-1).tolist())  # type: ignore[arg-type]
        return call(x, indices, *args)

    def turn(call: Any, *args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        return -found if isinstance(found, mx.array) else tuple(part[..., ::-1] for part in found)

    with hooked([(stack.module, note) for stack in stacks]):
        model(mx.array([PROMPT]))
        before, seen = seen, []
        with hooked([(at(model, path), turn) for path in routers]):
            model(mx.array([PROMPT]))
    assert before[0] != seen[0]


def test_without_experts_there_is_nothing_to_agree_on() -> None:
    with pytest.raises(UsageError, match="a llama model has no experts") as caught:
        find_routers(make_skeleton(config_of("llama")))
    assert caught.value.hint == "leave --agree-routing out"


def test_a_router_that_is_not_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = make_skeleton(config_of("mixtral"))
    block = type(skeleton.layers[0].block_sparse_moe)

    def call(self: Any, x: mx.array) -> mx.array:
        indices = mx.argmax(x @ self.gate.weight.T, axis=-1)[..., None]  # past any module
        found: mx.array = self.switch_mlp(x, indices).squeeze(-2)
        return found

    monkeypatch.setattr(block, "__call__", call)
    with pytest.raises(
        UsageError, match="does not find what chooses the experts of layer 0 of a mixtral model"
    ) as told:
        find_routers(skeleton)
    assert told.value.hint == "leave --agree-routing out"


def disturb(model: Any, family: str, rank: int) -> None:
    """Let a rank choose other experts than the first one would."""
    for path in find_routers(make_skeleton(config_of(family))) if rank else ():
        for module in at(model, path).modules():
            for name in ("weight", "e_score_correction_bias", "bias"):
                if name in module:
                    module[name] = module[name] + mx.random.normal(module[name].shape, key=mx.random.key(rank))


@pytest.mark.parametrize(
    ("family", "split", "shares"),
    [
        *((family, "hidden", [1, 1]) for family in ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h")),
        ("gemma4_text", "experts", [1, 2]),
        ("mixtral", "experts", [1, 1]),
        ("gpt_oss", "experts", [100, 1]),  # one rank has no expert, and nothing to do for a choice
        ("deepseek_v3", "tensor", [1, 1]),
    ],
)
def test_ranks_follow_the_first_one(family: str, split: str, shares: list[float]) -> None:
    found = look_at(family)
    whole = run_greedily(make_whole(family))

    def astray(model: Any, rank: int, group: Any) -> None:
        disturb(model, family, rank)

    def follow(model: Any, rank: int, group: Any) -> None:
        disturb(model, family, rank)
        follow_first_rank(model, make_skeleton(config_of(family)), group)

    if max(shares) < 100:  # or the other rank computes none of the experts
        assert not is_equal(run_split(family, found, split, shares, change=astray)[0], whole)[0]
    same, off = is_equal(run_split(family, found, split, shares, change=follow)[0], whole)
    assert same, off


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h", "llama", "gpt_oss"])
def test_what_a_witness_sees_differs_where_ranks_do(family: str) -> None:
    words: list[list[int]] = []
    for change in (0.0, 0.0, 1e-6, 1.0):
        model = make_whole(family)
        witness = Witness(model)
        model(mx.array([PROMPT]))
        assert witness.take().tolist() == [0, 0]
        witness.looks = True
        first = model.layers[0]
        for module in (m for _, m in first.named_modules() if "weight" in m and m.weight.ndim == 1):
            module.weight = module.weight * (1 + change * mx.arange(module.weight.size) / module.weight.size)
        model(mx.array([PROMPT]))
        witness.settle()
        words.append(witness.take().tolist())  # type: ignore[arg-type]
    alike, almost, other = words[1], words[2], words[3]
    assert words[0] == alike
    assert find_dissent([*alike, *almost, *alike]) is None
    dissent = find_dissent([*alike, *other, *alike])
    assert dissent is not None
    assert dissent.rank == 1


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h", "deepseek_v3"])
def test_tokens_are_dealt_out_to_all_experts(family: str) -> None:
    skeleton = make_skeleton(config_of(family))
    experts = count_experts(outline(skeleton, look(skeleton), config_of(family)))
    model, met = make_whole(family), dict[int, set[int]]()

    def note(layer: int) -> Any:
        def hook(call: Any, x: mx.array, indices: mx.array, *args: Any) -> Any:
            met.setdefault(layer, set()).update(indices.reshape(-1).tolist())  # type: ignore[arg-type]
            return call(x, indices, *args)

        return hook

    with hooked([(stack.module, note(stack.layer)) for stack in find_stacks(model)]), dealt(model, experts, 3):
        model(mx.array([[1] * max(experts)]))
    assert met == {layer: set(range(count)) for layer, count in enumerate(experts) if count}


def test_no_token_is_dealt_to_an_expert_twice() -> None:
    assert deal(2, (1, 2, 2), 4).tolist() == [[[2, 0], [3, 1]]]
    rows: list[list[int]] = deal(0, (50, 8), 20).tolist()  # type: ignore[assignment]
    assert {len(set(row)) for row in rows} == {8}
