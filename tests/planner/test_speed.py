"""The speed model against the published numbers that it has to reproduce, and against brute force."""

from __future__ import annotations

import itertools
import statistics

import pytest

from moectl.errors import PlanError, UsageError
from moectl.model.catalog import MODELS
from moectl.model.placement import make_placement
from moectl.model.structure import Structure
from moectl.planner.calibration import DEFAULT, PAPER, PAPER_NAIVE, PEERS, Calibration, find_link
from moectl.planner.chips import find_chip
from moectl.planner.speed import Prediction, Rates, Work, expected_busiest, expected_busiest_of_copies, predict
from tests.support.structures import dbrx


def run(
    nodes: int,
    split: str,
    *,
    bits: int = 4,
    chip: str = "m3-ultra",
    link: str = "rdma",
    calibration: Calibration = DEFAULT,
    context: int = 256,
    structure: Structure | None = None,
) -> Prediction:
    """Predict DBRX (or another model) on equal nodes; 128 tokens in, as in the paper."""
    found = find_chip(chip)
    rates = Rates(
        found.bandwidth_gb_s * 1e9 * calibration.memory_efficiency,
        found.fp16_tflops * 1e12 * calibration.compute_efficiency,
    )
    placement = make_placement(structure or dbrx(bits), split, nodes)
    return predict(Work(placement, context, 128), [rates] * nodes, find_link(calibration, link), calibration)


PAPER_ROWS = [(2, 6.1, 0.23), (4, 7.0, 0.33)]


@pytest.mark.parametrize(("nodes", "tok_s", "share"), PAPER_ROWS)
def test_the_papers_clusters(nodes: int, tok_s: float, share: float) -> None:
    """arXiv 2506.23635: within 10 % of its speed and 4 points of its share of communication, one set of constants."""
    got = run(nodes, "experts", bits=16, chip="m2-ultra", link="10gbe", calibration=PAPER)
    assert got.decode_tok_s == pytest.approx(tok_s, rel=0.10)
    assert got.communication_share == pytest.approx(share, abs=0.04)
    assert got.collectives_per_token == 40


QWEN, DEEPSEEK = "mlx-community/Qwen3-235B-A22B-Instruct-2507-8bit", "mlx-community/DeepSeek-V3.1-4bit"


@pytest.mark.parametrize(
    ("model", "nodes", "tok_s"), [(QWEN, 1, 19.5), (QWEN, 4, 31.9), (DEEPSEEK, 1, 21.1), (DEEPSEEK, 4, 32.5)]
)
def test_published_clusters_of_macs(model: str, nodes: int, tok_s: float) -> None:
    """M3 Ultras with RDMA, exo: within 10 %, with one set of constants for both models and numbers of nodes."""
    got = run(nodes, "tensor", calibration=PEERS, structure=MODELS[model].structure)
    assert got.decode_tok_s == pytest.approx(tok_s, rel=0.10)


def test_what_does_not_scale_on_published_clusters() -> None:
    """Launches, which every node makes for every layer: 200 to 350 µs per layer were reported of such software."""
    for model, least, most in ((QWEN, 180e-6, 200e-6), (DEEPSEEK, 250e-6, 300e-6)):
        kind = MODELS[model].structure.kinds[-1]
        assert least < PEERS.launch_s * kind.launches < most


def test_dense_models_have_no_experts_to_share_out() -> None:
    llama = MODELS["mlx-community/Llama-3.3-70B-Instruct-4bit"].structure
    with pytest.raises(
        PlanError, match="a llama model cannot be split by experts: it has no stacked experts"
    ) as caught:
        run(2, "experts", structure=llama)
    assert caught.value.hint == "use --split hidden or --split tensor or --split layers"
    # 40 GB at 0.8 × 819 GB/s: 17 tok/s at most; two nodes read half of it each.
    assert 13 < run(1, "hidden", structure=llama).decode_tok_s < 17
    assert run(2, "tensor", structure=llama).decode_tok_s > 1.5 * run(1, "hidden", structure=llama).decode_tok_s


def test_many_experts_with_copies_are_predicted_from_some_choices() -> None:
    qwen = MODELS[QWEN].structure
    once, twice = (make_placement(qwen, "experts", 4, replicas=n) for n in (1, 2))
    assert expected_busiest_of_copies(twice.owners, 8) < expected_busiest((32, 32, 32, 32), 8)
    assert expected_busiest_of_copies(once.owners, 8) == pytest.approx(expected_busiest((32,) * 4, 8), rel=0.02)


def test_the_papers_share_of_communication_on_three_nodes() -> None:
    got = run(3, "experts", bits=16, chip="m2-ultra", link="10gbe", calibration=PAPER)
    assert got.communication_share == pytest.approx(0.29, abs=0.04)


def test_the_papers_naive_cluster_in_named_terms() -> None:
    """1.2 tok/s, of which its experts took 5.2 times as long as with prestacking and dynamic loading."""
    naive = run(2, "experts", bits=16, chip="m2-ultra", link="10gbe", calibration=PAPER_NAIVE)
    assert naive.decode_tok_s == pytest.approx(1.2, rel=0.10)
    # The experts' part: the bytes that the busiest node reads of them, and the driver that wires them.
    read_s = expected_busiest((8, 8), 4) * 396.4e6 / (800e9 * PAPER.memory_efficiency)
    ratio = (read_s + PAPER_NAIVE.layer_overhead_s) / (read_s + PAPER.layer_overhead_s)
    assert ratio == pytest.approx(5.2, rel=0.10)


@pytest.mark.parametrize(
    ("shares", "published"),
    [((8, 8), 2.65), ((5, 5, 6), 2.26), ((4, 4, 4, 4), 1.97), ((2,) * 8, 1.39)],
)
def test_expected_busiest_as_published(shares: tuple[int, ...], published: float) -> None:
    assert expected_busiest(shares, 4) == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("shares", [(3, 2, 1), (1, 5), (2, 2, 2), (6,)])
def test_expected_busiest_equals_brute_force(shares: tuple[int, ...]) -> None:
    owner = [node for node, share in enumerate(shares) for _ in range(share)]
    loads = [
        max([owner[e] for e in chosen].count(node) for node in range(len(shares)))
        for chosen in itertools.combinations(range(6), 3)
    ]
    assert expected_busiest(shares, 3) == pytest.approx(statistics.mean(loads))


# Decode tok/s of the design's table (0.8 of the bandwidth, 100 µs per layer): made with an independent spreadsheet.
TABLE = [
    ("m3-ultra", 4, "rdma", "hidden", {1: 28.8, 2: 46, 3: 57, 4: 65}),
    ("m3-ultra", 4, "rdma", "experts", {2: 32, 3: 35, 4: 37}),
    ("m3-ultra", 4, "tb-tcp", "hidden", {2: 37, 3: 39, 4: 38}),
    ("m3-ultra", 4, "tb-tcp", "experts", {2: 28, 3: 27, 4: 27}),
    ("m3-ultra", 4, "tb-tcp", "tensor", {2: 32, 4: 28}),
    ("m2-ultra", 16, "tb-tcp", "experts", {2: 10.7, 3: 11.5, 4: 12.1}),
    ("m2-ultra", 16, "tb-tcp", "hidden", {2: 13.8, 3: 17.0, 4: 18.6}),
    ("m2-ultra", 8, "10gbe", "hidden", {1: 15.7, 2: 18, 3: 19, 4: 19}),
    ("m4-pro", 4, "rdma", "hidden", {2: 17.8, 3: 23.4, 4: 27.7}),
]


@pytest.mark.parametrize(("chip", "bits", "link", "split", "cells"), TABLE)
def test_the_designs_table(chip: str, bits: int, link: str, split: str, cells: dict[int, float]) -> None:
    for nodes, tok_s in cells.items():
        got = run(nodes, split, bits=bits, chip=chip, link=link, context=0)
        assert got.decode_tok_s == pytest.approx(tok_s, rel=0.07), nodes


def test_tensor_beats_hidden_on_rdma_only() -> None:
    for link, best in (("rdma", "tensor"), ("10gbe", "hidden")):
        speeds = {split: run(4, split, link=link).decode_tok_s for split in ("hidden", "tensor")}
        assert max(speeds, key=lambda s: speeds[s]) == best


def test_a_pipeline_is_never_faster_than_one_machine() -> None:
    for nodes in (2, 3, 4, 8):
        assert run(nodes, "layers").decode_tok_s <= run(1, "hidden").decode_tok_s


def test_exchanges_per_token() -> None:
    counts = {split: run(4, split).collectives_per_token for split in ("hidden", "experts", "tensor", "layers")}
    assert counts == {"hidden": 41, "experts": 41, "tensor": 81, "layers": 4}  # the step's agreement is one more
    assert run(1, "hidden").collectives_per_token == 0
    assert run(1, "hidden").communication_share == 0


def test_longer_contexts_and_slower_links_cost() -> None:
    assert run(2, "hidden", context=32768).decode_tok_s < run(2, "hidden", context=256).decode_tok_s
    speeds = [run(2, "hidden", link=link).decode_tok_s for link in ("rdma", "tb-tcp", "10gbe", "1gbe")]
    assert speeds == sorted(speeds, reverse=True)


def test_unknown_link() -> None:
    with pytest.raises(UsageError, match="it is one of rdma, tb-tcp, 10gbe, 1gbe"):
        find_link(DEFAULT, "carrier-pigeon")


def test_copies_make_the_busiest_node_less_busy() -> None:
    spans = make_placement(dbrx(4), "experts", 4)
    assert expected_busiest_of_copies(spans.owners, 4) == pytest.approx(expected_busiest((4, 4, 4, 4), 4))
    twice = make_placement(dbrx(4), "experts", 4, replicas=2)
    assert expected_busiest_of_copies(twice.owners, 4) == pytest.approx(1.16, abs=0.005)
    rates = [Rates(6e11, 2e13)] * 4
    speeds = [
        predict(Work(p, 256, 128), rates, find_link(DEFAULT, "rdma"), DEFAULT).decode_tok_s for p in (spans, twice)
    ]
    assert speeds[0] < speeds[1]
