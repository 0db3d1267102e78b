"""`bench`: real ranks measured and taken apart, what is counted, the table, the JSON, the files and the picture."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from mlx_lm.models.switch_layers import SwitchGLU

from moectl.cli import plot
from moectl.cli.verbs import bench as report
from moectl.engine.engine import Engine
from moectl.engine.network import exchange
from moectl.engine.network.load import load_rank
from moectl.engine.profile import _share_copies
from moectl.engine.protocol import Done, Generate, Prefilled, Profile, Profiled, Ready, Refused, Token
from moectl.engine.random_prompts import RandomPrompts
from moectl.engine.request import Request
from moectl.errors import PlanError, StateError, UsageError
from moectl.model.manifest import read_manifest
from moectl.model.placement import make_placement
from moectl.model.routing import Routing, read_routing, write_routing
from moectl.session.bench import Benchmark, Predicted, RankTime, Trial, _rank_time, bench, read_prediction
from moectl.session.session import Session
from moectl.shards.chat.tokenizer import open_tokenizer
from moectl.shards.prepare import Wanted, find_frequencies
from tests.cli.test_cli import run
from tests.engine.test_lockstep import cut_case
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.families import write_family
from tests.support.ring import process_env
from tests.support.structures import dbrx, structure_of
from tests.support.tiny import write_checkpoint, write_words

LAYERS, EXPERTS, TOP_K = 2, 16, 4
PROMPT, GENERATED = 40, 9
SHARES = {"hidden": (2, 4), "experts": (5, 11)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny-dbrx"
    write_checkpoint(directory, vocab_size=VOCAB_SIZE)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def alone(source: Path) -> Path:
    """The shard set of one rank."""
    return cut_case(source, source.parent / "one", "hidden", (6,), 16)


@pytest.fixture(scope="module", params=list(SHARES))
def measured(request: pytest.FixtureRequest, source: Path) -> tuple[Benchmark, list[int]]:
    """A benchmark of two real ranks, and every token that it ran."""
    shards = cut_case(source, source.parent / request.param, request.param, SHARES[request.param], 16)
    tokens: dict[int, list[int]] = {}
    with Session(specs(shards)) as session:
        with pytest.raises(UsageError, match="more than the model's context of 512"):
            bench(session, "tiny", prompt_tokens=500, generation_tokens=13, trials=1)
        generate = session.generate

        def listen(request: Request) -> Iterator[Token | Done]:
            tokens[request.id] = list(request.prompt_tokens or ())
            for event in generate(request):
                tokens[request.id] += [event.token] if isinstance(event, Token) else []
                yield event

        session.generate = listen  # type: ignore[method-assign]
        result = bench(session, "tiny", prompt_tokens=PROMPT, generation_tokens=GENERATED, trials=2)
    assert len({tokens[number][0] for number in (1, 2, 4)}) == 3  # no prompt begins as one before
    return result, tokens[2]


@pytest.mark.long
def test_a_prompt_that_was_seen_before_is_no_measurement(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt again, where the cache is asked: the benchmark refuses its own figures."""

    def look(request: Request) -> Iterator[Token | Done]:
        return generate(replace(request, cache_prompt=True))

    def bench_alone() -> Benchmark:
        return bench(session, "tiny", prompt_tokens=PROMPT, generation_tokens=GENERATED, trials=2)

    with Session(specs(alone)[:1]) as session:
        generate = session.generate
        session.generate = look  # type: ignore[method-assign]
        bench_alone()
    monkeypatch.setattr(RandomPrompts, "draw", lambda _, count: tuple(range(count)))
    with Session(specs(alone)[:1]) as session:
        generate = session.generate
        session.generate = look  # type: ignore[method-assign]
        with pytest.raises(
            StateError, match=f"{PROMPT - 1} of a prompt's {PROMPT} tokens came from the prompt cache"
        ) as caught:
            bench_alone()
    assert caught.value.hint == "measure a session that has no other user"
    with Session(specs(alone)[:1]) as session:
        assert bench_alone().trials


def test_prompts_are_the_same_everywhere_and_begin_each_in_its_own_way() -> None:
    one, other = RandomPrompts(50, seed=3), RandomPrompts(50, seed=3)
    drawn = [one.draw(20) for _ in range(50)]
    assert drawn == [other.draw(20) for _ in range(50)]
    assert len({prompt[0] for prompt in drawn}) == 50
    assert {token for prompt in drawn for token in prompt} == set(range(50))


def test_trials_have_exactly_the_tokens_asked_for(measured: tuple[Benchmark, list[int]]) -> None:
    result, tokens = measured
    assert len(tokens) == PROMPT + GENERATED
    assert len(result.trials) == 2
    for trial in result.trials:
        assert min(trial.prefill_tok_s, trial.decode_tok_s, trial.ttft_s) > 0


def test_the_parts_of_a_token_add_up(measured: tuple[Benchmark, list[int]]) -> None:
    result, _ = measured
    assert len(result.ranks) == 2
    for rank in result.ranks:
        assert rank.compute_s + rank.all_reduce_s + rank.other_s == pytest.approx(result.step_s)
        assert rank.compute_s > 0
        assert min(rank.all_reduce_s, rank.other_s, rank.overlap_s) >= 0
        assert rank.exchanges == LAYERS
        assert 0 < rank.peak_memory_bytes < rank.peak_rss_bytes


def choices(alone: Path, tokens: list[int]) -> list[np.ndarray[Any, Any]]:
    """Return what one process's routers choose for the tokens, (T, K) per layer, without anything of `profile`."""
    import mlx.core as mx

    model = load_rank(alone, read_manifest(alone), 0)
    seen: list[np.ndarray[Any, Any]] = []
    with pytest.MonkeyPatch.context() as patched:
        original: Any = SwitchGLU.__call__

        def spy(self: Any, x: mx.array, indices: mx.array) -> Any:
            seen.append(np.array(indices).astype(int).reshape(-1, TOP_K))
            return original(self, x, indices)

        patched.setattr(SwitchGLU, "__call__", spy)
        mx.eval(model(mx.array([tokens])))
    return seen


def test_routing_is_what_the_routers_chose(measured: tuple[Benchmark, list[int]], alone: Path) -> None:
    result, tokens = measured
    seen = choices(alone, tokens)
    expected = tuple(tuple(int((layer == e).sum()) for e in range(EXPERTS)) for layer in seen)
    assert result.routing == Routing("tiny", PROMPT + GENERATED, TOP_K, expected)
    assert sum(map(sum, expected)) == (PROMPT + GENERATED) * TOP_K * LAYERS


def test_imbalance_is_that_of_the_work(measured: tuple[Benchmark, list[int]], alone: Path) -> None:
    result, tokens = measured
    own = [rank.own_experts for rank in result.ranks]
    assert sum(own) == pytest.approx(TOP_K)
    if result.model.split == "hidden":
        assert own == pytest.approx([TOP_K * 2 / 6, TOP_K * 4 / 6])
        assert result.imbalance == pytest.approx(4 / 3)
        return
    first = np.concatenate([(layer < SHARES["experts"][0]).sum(axis=1) for layer in choices(alone, tokens)])
    assert own == pytest.approx([first.mean(), TOP_K - first.mean()])
    assert result.busiest_experts == pytest.approx(np.maximum(first, TOP_K - first).mean())
    assert result.imbalance is not None
    assert result.imbalance > max(own) / (TOP_K / 2)  # the busiest rank is not always the same


def test_text_and_json_of_real_ranks(measured: tuple[Benchmark, list[int]]) -> None:
    result, _ = measured
    assert len(report.bench_text(result).splitlines()) >= 7
    document = json.loads(json.dumps(report.bench_json(result)))
    assert set(document) == {
        "schema", "model", "split", "bits", "prompt_tokens", "generation_tokens", "prefill_tok_s", "decode_tok_s",
        "ttft_s", "trials", "step_s", "communication_share", "ranks", "busiest_experts", "imbalance", "routing",
        "predicted",
    }  # fmt: skip
    assert (document["schema"], document["split"], document["bits"]) == ("moectl.bench/1", result.model.split, None)
    assert set(document["ranks"][0]) == {
        "rank", "host", "compute_s", "all_reduce_s", "other_s", "exchanges", "own_experts", "peak_memory_bytes",
        "peak_rss_bytes", "overlap_s",
    }  # fmt: skip
    assert [rank["host"] for rank in document["ranks"]] == ["host0", "host1"]
    assert document["predicted"] is None
    assert document["decode_tok_s"]["mean"] == result.decode_tok_s.mean


# The engine's side.


def serve(shards: Path, *orders: Generate | Profile, tokenizer: Any = None) -> tuple[Any, list[Any]]:
    manifest = read_manifest(shards)
    model, vocab_size = load_rank(shards, manifest, 0), manifest.structure.vocab_size
    engine = Engine(
        model,
        tokenizer or open_tokenizer(shards),
        vocab_size=vocab_size,
        placement=manifest.placement,
        max_seq_len=512,
        prefill_step=16,
    )
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for order in (*orders, None):
        inbox.put(order)
    return model, list(engine.serve(inbox))


def ask(number: int, tokens: tuple[int, ...], max_tokens: int = 8, **more: Any) -> Generate:
    return Generate(Request(number, "", max_tokens, prompt_tokens=tokens, **more))


def tokens_of(events: list[Any], number: int) -> list[int]:
    return [e.token for e in events if isinstance(e, Token) and e.id == number]


def test_a_profile_waits_its_turn_and_leaves_nothing_behind(alone: Path) -> None:
    prompt = tuple(range(30, 60))
    profile = Profile(2, list(range(100)), 7)
    model, events = serve(alone, ask(1, prompt), profile, ask(3, prompt))
    kinds = [type(e).__name__ for e in events]
    assert kinds.index("Done") < kinds.index("Profiled") < len(kinds) - 1 - kinds[::-1].index("Token")
    assert tokens_of(events, 1) == tokens_of(events, 3)
    [told] = [e for e in events if isinstance(e, Profiled)]
    assert (told.id, told.layers, told.exchanges, told.all_reduce_s) == (2, [0, 1], 0, 0.0)
    assert [sum(layer) for layer in told.chosen] == [100 * TOP_K] * LAYERS
    assert 0 < told.compute_s <= told.step_s
    assert [e.tokens for e in events if isinstance(e, Prefilled) and e.id == 2] == [16, 32, 48, 64, 80, 92]
    assert all(type(layer.ffn.experts) is SwitchGLU for layer in model.layers)
    assert exchange._observer.get() is None


def test_orders_that_reach_ranks_at_different_times(source: Path) -> None:
    """Rank 0 knows of a request behind the profile while the other rank does not even know of the profile."""
    shards = cut_case(source, source.parent / "late", "hidden", (3, 3), 16)
    orders: list[Generate | Profile] = [
        ask(1, (1, 2, 3), 20),
        Profile(2, list(range(40)), 5),
        ask(3, (1, 2, 3), 20),
        Profile(4, [5, 6], 1),
    ]
    with Session(specs(shards), step_timeout_s=30) as session:
        for rank in range(2):
            for order in orders:
                session._links[rank].send(order)
            time.sleep(0.3)
        events: list[tuple[int, Any]] = []
        while len([e for _, e in events if isinstance(e, Profiled)]) < 4:
            rank, event = session._next_event(30)
            assert isinstance(event, Token | Done | Prefilled | Profiled), event
            events.append((rank, event))
    assert sorted((e.id, rank) for rank, e in events if isinstance(e, Profiled)) == [(2, 0), (2, 1), (4, 0), (4, 1)]
    told = [e for _, e in events]
    assert tokens_of(told, 1) == tokens_of(told, 3)
    assert len(tokens_of(told, 1)) == 20


def test_eos_ends_an_answer_unless_it_is_ignored(alone: Path) -> None:
    prompt = tuple(range(50, 60))
    _, events = serve(alone, ask(1, prompt, 12))
    answer = tokens_of(events, 1)
    assert len(answer) == 12
    tokenizer = open_tokenizer(alone)
    tokenizer.eos_token_ids.add(answer[5])
    stop = answer.index(answer[5])
    _, events = serve(alone, ask(1, prompt, 12), ask(2, prompt, 12, ignore_eos=True), tokenizer=tokenizer)
    assert tokens_of(events, 1) == answer[:stop]
    assert tokens_of(events, 2) == answer
    assert [e.finish_reason for e in events if isinstance(e, Done)] == ["stop", "length"]


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**40])
def test_tokens_outside_the_vocabulary_are_refused(token: int, alone: Path) -> None:
    _, [refused] = serve(alone, ask(1, (1, token, 2)))
    assert isinstance(refused, Refused)
    assert (
        refused.to_error().message
        == f"a prompt token should be in the model's vocabulary of {VOCAB_SIZE}, it is outside"
    )


def test_empty_and_long_token_prompts_are_refused(alone: Path) -> None:
    _, events = serve(alone, ask(1, ()), ask(2, (3,) * 512))
    assert [type(e) for e in events] == [Refused, Refused]


# What people and scripts see.


def four_hosts(**changes: Any) -> Benchmark:
    ranks = tuple(
        RankTime(r, f"mac{r + 1}", 0.11 + 0.002 * r, 0.044 - 0.002 * r, 0.007, 40, 1.0, 74_300_000_000, 75_000_000_000)
        for r in range(4)
    )
    return replace(
        Benchmark(
            "dbrx-instruct-bf16-experts-4",
            Ready("experts", None, 100352, 32768, 4),
            512,
            128,
            (Trial(61.4, 1 / 0.16, 8.4), Trial(60.6, 1 / 0.162, 8.6)),
            ranks,
            1.6,
            Routing("dbrx", 8, 2, ((8, 4, 2, 2), (4, 4, 4, 4))),
        ),
        **changes,
    )


PREDICTED = Predicted(6.1, 63.0, 8.1, 0.23)


def test_the_table_fits_80_columns() -> None:
    assert report.bench_text(four_hosts(predicted=PREDICTED), width=80).splitlines() == [
        "          TOK/S  ± SD  PREDICTED  FIRST TOKEN  PREDICTED",
        "prompt     61.0   0.6       63.0",
        "generate    6.2   0.1        6.1        8.5 s      8.1 s",
        "(2 trials, 512 prompt + 128 generated, 4 hosts, bf16)",
        "per token 161 ms = 116 compute + 38 all-reduce + 7 other",
        "RANK  HOST   COMPUTE  ALL-REDUCE   OTHER     PEAK  EXPERTS",
        "   0  mac1  110.0 ms     44.0 ms  7.0 ms  74.3 GB     1.00",
        "   1  mac2  112.0 ms     42.0 ms  7.0 ms  74.3 GB     1.00",
        "   2  mac3  114.0 ms     40.0 ms  7.0 ms  74.3 GB     1.00",
        "   3  mac4  116.0 ms     38.0 ms  7.0 ms  74.3 GB     1.00",
        "busiest rank: 1.60 experts per layer, 1.60× the mean",
        "experts work on 25% to 100% of a layer's tokens (even: 50%)",
    ]


def test_the_note_stands_beside_the_header_where_there_is_room() -> None:
    first = report.bench_text(four_hosts(), width=100).splitlines()[0]
    assert first == "          TOK/S  ± SD  FIRST TOKEN    (2 trials, 512 prompt + 128 generated, 4 hosts, bf16)"


@pytest.mark.parametrize("width", [60, 64, 80, 100, 200])
@pytest.mark.parametrize("predicted", [None, PREDICTED])
def test_no_line_is_wider_than_the_terminal(width: int, predicted: Predicted | None) -> None:
    ranks = tuple(replace(rank, host="studio-in-the-attic", other_s=0.0, overlap_s=0.05) for rank in four_hosts().ranks)
    for result in (four_hosts(predicted=predicted), four_hosts(predicted=predicted, ranks=ranks)):
        for line in report.bench_text(result, width=width).splitlines():
            assert len(line) <= width, line


def test_one_trial_on_one_rank_with_layers_that_take_turns() -> None:
    one = four_hosts(trials=(Trial(61.4, 6.2, 8.4),), ranks=four_hosts().ranks[:1], busiest_experts=None)
    lines = report.bench_text(one, width=80).splitlines()
    assert lines[3] == "(1 trial, 512 prompt + 128 generated, 1 rank, bf16)"
    assert lines[2].split() == ["generate", "6.2", "-", "8.4", "s"]
    assert not any(line.startswith("busiest") for line in lines)
    document = report.bench_json(one)
    assert (document["decode_tok_s"]["sd"], document["imbalance"]) == (None, None)


def profiled(compute_s: float, all_reduce_s: float) -> Profiled:
    return Profiled(1, compute_s, all_reduce_s, 0.2, 40, 1, 1, [0], [[1]], 1.0, 1.0)


def test_parts_that_exceed_a_step_say_so() -> None:
    profiles = [profiled(0.1, 0.1)]
    rank = _rank_time(0, "mac1", profiles, 0.161)
    assert (rank.compute_s, rank.all_reduce_s, rank.other_s) == pytest.approx((0.1, 0.061, 0.0))
    assert rank.overlap_s == pytest.approx(0.039)
    text = report.bench_text(four_hosts(ranks=(rank,)), width=80)
    assert "per token 161 ms = 100 compute + 61 all-reduce + 0 other" in text
    assert "the parts alone take 24% longer: busy machine or tiny model" in text


def test_several_lengths_are_rows_of_a_table_of_markdown_or_of_csv() -> None:
    both = [four_hosts(), four_hosts(prompt_tokens=64)]
    name = "dbrx-instruct-bf16-experts-4"
    markdown = report.several_text(both, "md").splitlines()
    assert markdown[1] == "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[2] == f"| {name} | 4 | experts | bf16 | 512 | 128 | 61.00 ± 0.57 | 6.21 ± 0.05 | 8.500 |"
    assert report.several_text(both, "csv").splitlines()[2].startswith(f"{name},4,experts,bf16,64,128,")
    assert report.several_text(both, "table").splitlines()[0] == name


@given(st.floats(1e-4, 10), st.floats(0, 1), st.floats(0, 1))
def test_the_shown_parts_add_up_to_the_shown_total(step_s: float, compute: float, all_reduce: float) -> None:
    profiles = [profiled(step_s * compute, step_s * all_reduce)]
    rank = _rank_time(0, "a", profiles, step_s)
    text = report.bench_text(four_hosts(trials=(Trial(1.0, 1 / step_s, 1.0),), ranks=(rank,)), width=80)
    shown = re.search(r"per token ([\d.]+) ms = ([\d.]+) compute \+ ([\d.]+) all-reduce \+ ([\d.]+) other", text)
    assert shown
    total, first, second, rest = map(float, shown.groups())
    assert first + second + rest == pytest.approx(total)


# Files.

layers = st.integers(1, 40).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.lists(st.permutations([tokens, tokens, 0, 0]), min_size=1, max_size=4))
)


@given(layers)
def test_routing_files_survive(tmp_path_factory: pytest.TempPathFactory, made: tuple[int, list[list[int]]]) -> None:
    tokens, counts = made
    routing = Routing("tiny", tokens, 2, tuple(map(tuple, counts)))
    path = tmp_path_factory.getbasetemp() / "routing.json"
    write_routing(path, routing)
    assert read_routing(path) == routing
    assert all(sum(layer) == pytest.approx(2) for layer in routing.frequencies)


GOOD = {"schema": "moectl.routing/1", "model": "x", "tokens": 3, "top_k": 2, "counts": [[3, 3, 0], [2, 2, 2]]}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "moectl.routing/2"},
        {"tokens": 4},
        {"tokens": True},
        {"top_k": 4},
        {"counts": [[3, 3, 0], [2, 2]]},
        {"counts": [[3, 4, -1]]},
        {"counts": [[3.0, 3.0, 0.0]]},
        {"counts": []},
        {"counts": 7},
    ],
)
def test_damaged_routing_files_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(GOOD))
    assert read_routing(path).tokens == 3
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(UsageError, match="does not hold routing statistics"):
        read_routing(path)


def test_files_that_are_not_there_or_not_json(tmp_path: Path) -> None:
    def read_plan(path: Path) -> Predicted:
        return read_prediction(path, None, None, prompt_tokens=1)

    for read in (read_routing, read_plan, lambda path: plot.read_documents([path])):
        with pytest.raises(UsageError, match="cannot be read: No such file"):
            read(tmp_path / "absent")
        (tmp_path / "text").write_text("[" * 100_000)
        with pytest.raises(UsageError, match="text"):
            read(tmp_path / "text")


def test_a_prediction_comes_from_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    prediction: dict[str, Any] = {"decode_tok_s": 6.1, "prefill_tok_s": 63, "ttft_s": 8.1, "communication_share": 0.23}
    planned = {"schema": "moectl.plan/1", "split": "experts", "shares": [1, 1], "q_bits": 4, "layers": 40}
    path.write_text(json.dumps({**planned, "prediction": prediction}))
    placement = make_placement(dbrx(), "experts", 2)
    found = read_prediction(path, placement, 4, prompt_tokens=126)
    assert found == Predicted(6.1, 63, 2.0, 0.23)  # the first token's time is that of this many prompt tokens
    for other, bits in ((make_placement(dbrx(), "hidden", 2), 4), (placement, None)):
        with pytest.raises(
            UsageError, match=r"plans something else: experts 0\.5:0\.5 of 40 layers at 4 bits, and here is "
        ):
            read_prediction(path, other, bits, prompt_tokens=126)
    bad: list[Any] = [{**planned, "prediction": None}, {"schema": "x"}, {}, []]
    for wrong in bad:
        path.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=r"has no prediction of this version's 'moectl plan --json'"):
            read_prediction(path, None, None, prompt_tokens=1)


def test_a_disk_that_refuses_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    routing = Routing("x", 1, 1, ((1,),))
    with pytest.raises(StateError, match="cannot be written"):
        write_routing(tmp_path / "taken", routing)
    with pytest.raises(StateError, match="cannot be written"):
        write_routing(tmp_path / "absent" / "file", routing)
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_copies_share_each_tokens_experts() -> None:
    """Two copies of each of four experts on two ranks: each rank runs half of what is chosen, not all it holds."""
    owners = ((0, 1),) * 4
    work = _share_copies(owners, 2, np.array([[0, 1], [2, 3], [0, 3]]))
    assert work.tolist() == [[1.0] * 3, [1.0] * 3]
    uneven = _share_copies(((0,), (0,), (0, 1), (1,)), 2, np.array([[0, 1], [2, 3], [0, 2]]))
    assert uneven.tolist() == [[2.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


# The picture.


def svg_texts(path: Path) -> list[str]:
    return [(e.text or "").strip() for e in ET.parse(path).iter() if e.tag.endswith("}text")]


@pytest.mark.long
def test_a_plot_of_one_benchmark_shows_trials_and_ranks(tmp_path: Path) -> None:
    path = tmp_path / "one.svg"
    plot.write_plot(path, [report.bench_json(four_hosts(predicted=PREDICTED))])
    texts = svg_texts(path)
    for text in ("measured", "predicted", "trial", "0 mac1", "3 mac4", "all-reduce", "dbrx-instruct-bf16-experts-4"):
        assert text in texts
    first = path.read_bytes()
    plot.write_plot(path, [report.bench_json(four_hosts(predicted=PREDICTED))])
    assert path.read_bytes() == first
    plot.write_plot(path, [report.bench_json(four_hosts())])
    assert "predicted" not in svg_texts(path)


def test_a_plot_of_several_shows_numbers_of_ranks(tmp_path: Path) -> None:
    results = [four_hosts(predicted=PREDICTED), four_hosts(ranks=four_hosts().ranks[:2])]
    earlier = tmp_path / "two.json"
    earlier.write_text(json.dumps(report.bench_json(results[1])))
    plot.write_plot(tmp_path / "both.svg", [*plot.read_documents([earlier]), report.bench_json(results[0])])
    texts = svg_texts(tmp_path / "both.svg")
    for text in ("2 ranks", "4 ranks", "ranks", "measured", "predicted"):
        assert text in texts


def test_without_matplotlib_a_plot_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot.check_plot(tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    attempts: list[Callable[[Path], None]] = [plot.check_plot, lambda path: plot.write_plot(path, [])]
    for attempt in attempts:
        with pytest.raises(UsageError, match="matplotlib, which is not installed") as refused:
            attempt(tmp_path / "a.svg")
        assert refused.value.hint == "pip install 'moectl[plot]'"
    assert list(tmp_path.iterdir()) == []


# As a user types it.


def moectl(*words: str, code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "moectl", "bench", *words],
        capture_output=True, text=True, env=process_env(**env), timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_verb_with_everything(source: Path, tmp_path: Path) -> None:
    plan, stats, picture = (tmp_path / name for name in ("plan.json", "routing.json", "picture.svg"))
    planned = {"schema": "moectl.plan/1", "split": "experts", "shares": [1, 1], "q_bits": 16, "layers": LAYERS}
    plan.write_text(json.dumps({**planned, "prediction": {"decode_tok_s": 1, "prefill_tok_s": 2, "ttft_s": 3}}))
    files = ("--plan", str(plan), "--routing-stats", str(stats), "--plot", str(picture))
    target = ("--model", str(source), "--local", "2", "--split", "experts")
    done = moectl(*target, "-p", "16", "-g", "4", "--num-trials", "2", "--json", *files)
    document = json.loads(done.stdout)
    assert document["model"] == "tiny-dbrx-bf16-experts-2"
    assert (document["prompt_tokens"], document["generation_tokens"], len(document["trials"])) == (16, 4, 2)
    assert document["predicted"] == {
        "decode_tok_s": 1.0,
        "prefill_tok_s": 2.0,
        "ttft_s": 8.0,
        "communication_share": None,
    }
    assert [rank["rank"] for rank in document["ranks"]] == [0, 1]
    assert "trial 2 of 2: prompt " in done.stderr
    routing = read_routing(stats)
    assert [list(layer) for layer in routing.counts] == document["routing"]["counts"]
    assert (routing.tokens, routing.model) == (20, "tiny-dbrx-bf16-experts-2")
    assert "predicted" in svg_texts(picture)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compare", "x.json"), "--compare is for --plot"),
        (("--plot", "x.png"), "should end in .svg"),
        (("--plot", "absent/x.svg"), "is not a directory that can be written to"),
        (("--routing-stats", "absent/x.json"), "is not a directory that can be written to"),
        (("--plan", "absent.json"), "absent.json cannot be read"),
        (("-g", "1"), "1 is not in the range x>=2"),
        (("--num-trials", "0"), "0 is not in the range x>=1"),
        (("-p", "32,x"), "'32,x' is no list of numbers: write 512 or 32,64"),
        (("-p", "32,64", "--plot", "x.svg"), "several lengths and --plot exclude each other"),
        (("--json", "--format", "md"), "--json and --format exclude each other"),
        (("--local", "1", "-p", "5000"), "use -p 1920, or less"),
    ],
)
def test_wrong_words_are_usage_errors(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, said = run(capsys, monkeypatch, "bench", *words)
    assert (code, message in said) == (2, True), said


@pytest.mark.long
def test_a_dense_model_has_no_choices_to_count(tmp_path: Path) -> None:
    source = write_words(write_family("llama", tmp_path / "llama"))
    measure = ("--model", str(source), "--local", "2", "-p", "8", "-g", "3", "--num-trials", "1")
    refused = moectl(*measure, "--routing-stats", str(tmp_path / "routing.json"), code=2).stderr
    assert "has no experts: there are no choices to count" in refused
    assert "Hint: leave --routing-stats out" in refused
    document = json.loads(moectl(*measure, "--json").stdout)
    assert (document["routing"], document["imbalance"]) == (None, None)
    assert "experts work on" not in moectl(*measure).stdout


@pytest.mark.long
def test_what_the_hints_about_its_files_say_is_done(source: Path, tmp_path: Path) -> None:
    stats, earlier, picture = (tmp_path / name for name in ("routing.json", "earlier.json", "picture.svg"))
    with pytest.raises(UsageError) as caught:
        read_routing(stats)
    assert caught.value.hint == "moectl bench --routing-stats FILE writes one"
    earlier.write_text("{}")
    with pytest.raises(UsageError) as caught:
        plot.read_documents([earlier])
    assert caught.value.hint == "moectl bench --json > FILE"
    structure = structure_of(json.loads((source / "config.json").read_text()))
    others = Routing("other", 4, 1, ((4, 0),))
    with pytest.raises(PlanError) as refused:
        find_frequencies(Wanted(routing=others), structure)
    assert refused.value.hint == "moectl bench --routing-stats FILE counts this model's"
    measure = ("--model", str(source), "--local", "1", "-p", "8", "-g", "3", "--num-trials", "1")
    earlier.write_text(moectl(*measure, "--routing-stats", str(stats), "--json").stdout)
    assert find_frequencies(Wanted(routing=read_routing(stats)), structure)
    assert "Hint: add --plot FILE.svg\n" in moectl(*measure, "--compare", str(earlier), code=2).stderr
    moectl(*measure, "--compare", str(earlier), "--plot", str(picture))
    assert svg_texts(picture)
