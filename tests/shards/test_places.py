"""Where bytes lie: copies and transposed copies are found, and the writer's byte path can take them as they are."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moectl.shards.trace.parts import full, part
from moectl.shards.trace.places import Rectangle, find_rectangles
from moectl.shards.trace.traced import Expression
from tests.shards.test_trace import equal, regions
from tests.support.layouts import LAYOUTS, write_layout
from tests.support.tiny import write_checkpoint
from tests.support.traced import Traced, open_traced


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traced]:
    names = [*LAYOUTS, "dbrx"]
    directories = {name: tmp_path_factory.mktemp(name) for name in names}
    write_checkpoint(directories["dbrx"], layout="fused", n_experts=4)
    return {
        name: open_traced(write_layout(path, name) if name in LAYOUTS else path) for name, path in directories.items()
    }


def read_rectangles(traced: Traced, node: Expression, rectangles: list[Rectangle]) -> mx.array:
    """Read a region as the writer reads pieces: row by row, from the file."""
    flat = []
    item = node.dtype.size
    for r in rectangles:
        tensor = traced.stored[r.name]
        rows = []
        with (traced.directory / tensor.file).open("rb") as f:
            for row in range(r.rows):
                f.seek(tensor.offset + r.offset + row * r.stride)
                rows.append(mx.array(list(f.read(r.cols * item)), mx.uint8).view(node.dtype))
        block = mx.stack(rows)
        flat.append((block.T if r.transposed else block).reshape(-1))
    assert [r.at for r in rectangles] == [sum(a.size for a in flat[:i]) for i in range(len(flat))]
    return mx.concatenate(flat)


@pytest.mark.parametrize("name", [*LAYOUTS, "dbrx"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rectangles_hold_the_bytes_of_a_region(name: str, checkpoints: dict[str, Traced], data: st.DataObject) -> None:
    traced = checkpoints[name]
    node = traced.parameters[data.draw(st.sampled_from(sorted(traced.parameters)))]
    region = data.draw(regions(node.shape))
    rectangles = find_rectangles(node, region)
    if rectangles is not None:
        expected = part(node, region, traced.read)
        assert equal(read_rectangles(traced, node, rectangles), expected.reshape(-1))


def kind_of(node: Expression) -> str:
    rectangles = find_rectangles(node, full(node.shape))
    if rectangles is None:
        return "computed"
    return "turned" if any(r.transposed for r in rectangles) else f"copied in {len(rectangles)}"


def test_copies_and_transposed_copies_are_recognised(checkpoints: dict[str, Traced]) -> None:
    def kinds(name: str, *patterns: str) -> list[set[str]]:
        found = checkpoints[name].parameters
        return [{kind_of(node) for n, node in found.items() if n.endswith(pattern)} for pattern in patterns]

    assert kinds("mixtral", "_proj.weight") == [{"copied in 1", "copied in 4"}]
    assert kinds("qwen3", "weight") == [{"copied in 1"}]
    assert kinds("dbrx", "up_proj.weight", "down_proj.weight") == [{"copied in 1"}, {"turned"}]
    gpt = kinds("gpt-oss-mxfp4", "gate_proj.weight", "down_proj.weight", "gate_proj.scales", "gate_proj.bias")
    assert gpt == [{"copied in 1"}] * 4  # every other row
    assert kinds("deepseek-v3-fp8", "q_a_proj.weight", "switch_mlp.up_proj.weight") == [{"computed"}, {"computed"}]
    kimi = kinds("kimi-k2-int4", "up_proj.weight", "up_proj.scales", "up_proj.biases", "embed_q.weight", "out.weight")
    assert kimi[0] == {"copied in 1", "copied in 4"}
    assert kimi[1:] == [{"copied in 4"}, {"computed"}, {"turned"}, {"copied in 6"}]
    assert Counter(map(kind_of, checkpoints["mlx-overrides"].parameters.values())).keys() == {"copied in 1"}
