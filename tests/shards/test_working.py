"""What a pass keeps, from MLX's graph: moments by how arrays are divided, and operations of a layer."""

from __future__ import annotations

import mlx.core as mx
import pytest

from moectl.shards.look.skeleton import make_skeleton
from moectl.shards.look.units import divisions_of
from moectl.shards.look.ways import look
from moectl.shards.look.working import count_launches, find_moments
from tests.support.families import config_of
from tests.support.structures import structure_of


def test_only_a_gpu_writes_scores_out_for_heads_of_a_rare_width() -> None:
    """Four heads of 48: each writes one number for a pair of tokens."""
    config = {**config_of("llama"), "hidden_size": 192}
    skeleton = make_skeleton(config)
    divisions = divisions_of(skeleton.model, look(skeleton).parts, "tensor")
    cpu, gpu = (find_moments(skeleton, (0,) * 4, divisions, on_gpu=on_gpu) for on_gpu in (False, True))
    assert {moment.head_pairs for moment in cpu} == {0}
    assert max(moment.head_pairs for moment in gpu) >= 4


def test_arrays_are_divided_as_the_projections_that_make_them() -> None:
    moments = structure_of(config_of("llama")).gpu_moments
    hidden, heads = (max(getattr(moment, name) for moment in moments) for name in ("hidden", "heads"))
    assert hidden >= 2 * 256  # what goes into the down projection, and a part of what it is made of
    assert heads >= 3 * 128  # queries, keys and values


def test_linear_attention_keeps_each_tokens_state_on_a_cpu() -> None:
    structure = structure_of(config_of("qwen3_next"))
    state = 4 * 32 * 32  # heads × keys' width × values' width
    assert max(moment.whole for moment in structure.cpu_moments) > state
    assert max(moment.whole for moment in structure.gpu_moments) < max(m.whole for m in structure.cpu_moments)


@pytest.mark.parametrize(("family", "least", "most"), [("llama", 15, 25), ("dbrx", 35, 45), ("deepseek_v3", 45, 55)])
def test_operations_of_a_layer(family: str, least: int, most: int) -> None:
    assert least <= structure_of(config_of(family)).kinds[0].launches <= most


def test_a_graph_that_mlx_cannot_write_down_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to get state for primitive New")

    monkeypatch.setattr(mx, "export_function", fail)
    skeleton = make_skeleton(config_of("llama"))
    assert find_moments(skeleton, (0,) * 4, {}, on_gpu=False) == ()
    assert count_launches(skeleton, (0,) * 4) == [0]
