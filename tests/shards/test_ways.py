"""What looks as if it could be divided and cannot is refused, with a reason and with the ways that work."""

from __future__ import annotations

import numpy as np
import pytest

from moectl.errors import PlanError
from moectl.model.placement import SPLITS
from moectl.shards.look.skeleton import Skeleton, make_skeleton
from moectl.shards.look.units import Block, Unit
from moectl.shards.look.ways import Findings, look, require, ways
from tests.support.families import config_of
from tests.support.toy import HIDDEN, make_toy


def found_in(odd: str) -> tuple[Skeleton, Findings]:
    skeleton = make_toy(odd)
    return skeleton, look(skeleton)


def first_block(found: Findings) -> Block:
    return found.parts[0].blocks[0]


def first_unit(found: Findings) -> Unit:
    return first_block(found).units[0]


def test_a_plain_model_can_be_split() -> None:
    _, found = found_in("")
    assert found.ways == {"experts": "it has no stacked experts", "hidden": None, "tensor": None, "layers": None}
    assert (first_unit(found).hidden, first_unit(found).segments, first_unit(found).width) == (HIDDEN, 1, 1)
    assert first_block(found).sums == "block"
    assert [(heads.path, heads.count, heads.kv_count) for heads in found.parts[0].heads] == [("attn", 4, 4)]
    assert set(found.parts[0].heads[0].widths) == {"q_proj", "k_proj", "v_proj", "o_proj", "sinks"}


@pytest.mark.parametrize(("odd", "segments", "width"), [("fused", 2, 1), ("interleaved", 1, 2)])
def test_gate_and_up_in_one_matrix(odd: str, segments: int, width: int) -> None:
    _, found = found_in(odd)
    assert found.ways["hidden"] is None
    assert (first_unit(found).hidden, first_unit(found).segments, first_unit(found).width) == (HIDDEN, segments, width)


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("across", "it computes across its hidden dimension"),
        ("residual", "its result is not that of its down projection"),
        ("unused", "it computes across its hidden dimension"),
        ("strange", "moectl does not know what smooth of its projections is"),
    ],
)
def test_what_only_looks_like_an_mlp_is_refused(odd: str, reason: str) -> None:
    _, found = found_in(odd)
    assert found.ways["hidden"] == found.ways["tensor"] == f"layers.0.mlp cannot be divided: {reason}"
    assert found.ways["layers"] is None


def test_a_block_that_is_not_linear_sums_in_its_unit() -> None:
    _, found = found_in("squared")
    assert found.ways["hidden"] is None
    assert first_block(found).sums == "unit"


def test_an_attention_with_a_norm_over_all_heads_stays_whole() -> None:
    _, found = found_in("norm")
    assert found.ways["tensor"] == "it has no attention whose heads moectl knows how to divide"
    assert found.ways["hidden"] is None


def test_an_attention_that_gives_its_keys_away_is_divided_in_all_layers_only() -> None:
    skeleton = make_toy("keys")
    assert ways(skeleton)["tensor"] is None
    skeleton = make_toy("keys")
    skeleton.layers[1].attn.odd = "norm"
    assert ways(skeleton)["tensor"] == "it has no attention whose heads moectl knows how to divide"


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ("twice", "layer 0 is used more than once for a token"),
        ("first", "layer 1 takes more from earlier layers than their state"),
        ("sum", "what comes after the last layer takes the states of several layers"),
        ("cache", "layer 1 uses the cache of another layer"),
    ],
)
def test_what_is_no_line_of_layers_is_refused(odd: str, reason: str) -> None:
    _, found = found_in(odd)
    assert found.ways["layers"] == reason
    assert found.ways["hidden"] is None


def test_an_mlp_of_several_layers_is_refused() -> None:
    skeleton = make_toy()
    skeleton.layers[1].mlp = skeleton.layers[0].mlp
    assert ways(skeleton)["hidden"] == "several layers share an MLP or an attention"  # each layer would sum it again


def test_positions_from_another_layers_cache_are_refused() -> None:
    # Its linear attention takes positions from the cache of the layers with full attention.
    found = ways(make_skeleton(config_of("bailing_hybrid")))
    assert found["layers"] == "layer 0 gets a mask or positions that another layer's cache decides"


def test_caches_are_found_where_not_every_layer_has_one() -> None:
    found = look(make_skeleton(config_of("nemotron_h")))
    assert found.flow is not None
    assert found.flow.caches == (0, None, 1, None, None, 2)
    assert found.flow.before == {"backbone.embeddings"}
    assert found.flow.after == {"backbone.norm_f", "lm_head"}


def test_looking_changes_nothing() -> None:
    skeleton = make_skeleton(config_of("nemotron_h"))
    before = [(path, type(module), dict(module.__dict__)) for path, module in skeleton.model.named_modules()]
    look(skeleton)
    after = [(path, type(module), dict(module.__dict__)) for path, module in skeleton.model.named_modules()]
    assert str(after) == str(before)
    assert not any(np.array(array).any() for array in skeleton.parameters.values())


def test_a_refusal_names_the_ways_that_work() -> None:
    skeleton, found = found_in("across")
    require(skeleton, found, "layers")
    with pytest.raises(PlanError, match=r"a toy across model cannot be split by hidden: layers\.0\.mlp") as error:
        require(skeleton, found, "hidden")
    assert error.value.hint == "use --split layers"
    nothing = Findings([], None, dict.fromkeys(SPLITS, "no"))
    with pytest.raises(PlanError) as error:
        require(skeleton, nothing, "hidden")
    assert error.value.hint == "it runs on one host only"
