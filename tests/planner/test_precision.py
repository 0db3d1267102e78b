"""The default precision: the most bits that the hosts hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moectl.hosts.hostfile import Host
from moectl.model.catalog import MODELS
from moectl.model.structure import Quantization
from moectl.planner.memory import Memory, Verdict
from moectl.planner.plan import Node
from moectl.planner.precision import PRECISIONS, choose_precision
from moectl.planner.questions import PlanOptions, choose_bits_here, choose_bits_on
from moectl.shards import prepare
from moectl.shards.prepare import Wanted
from tests.cli.test_cli import run
from tests.support.tiny import write_checkpoint, write_words


def grade(fits: int, borderline: int = 0) -> object:
    return lambda q: (
        Verdict.FITS
        if (q.bits if q else 16) <= fits
        else Verdict.BORDERLINE
        if (q.bits if q else 16) <= borderline
        else Verdict.TOO_MUCH
    )


@pytest.mark.parametrize(
    ("fits", "borderline", "bits", "verdict"),
    [
        (16, 16, None, Verdict.FITS),
        (8, 16, 8, Verdict.FITS),
        (5, 6, 5, Verdict.FITS),
        (0, 4, 4, Verdict.BORDERLINE),
        (2, 2, 3, Verdict.TOO_MUCH),
    ],
)
def test_the_most_bits_that_fit_are_chosen(fits: int, borderline: int, bits: int | None, verdict: Verdict) -> None:
    chosen = PRECISIONS[0] if bits is None else Quantization(bits, 64)
    assert choose_precision(grade(fits, borderline)) == (chosen, verdict)  # type: ignore[arg-type]


def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    return run(capsys, monkeypatch, "plan", "--chip", "m4-max", *words)


def test_plan_chooses_bits_and_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = plan(capsys, monkeypatch, "--hosts", "a,b", "--memory", "64GB")
    assert code == 0
    assert "4 bits: the most that fit; --q-bits sets others." in out
    code, out, _ = plan(capsys, monkeypatch, "--hosts", "a,b", "--memory", "64GB", "--q-bits", "16")
    assert code == 4  # --q-bits always wins
    assert "the most that fit" not in out
    code, out, err = plan(capsys, monkeypatch, "--hosts", "a,b", "--memory", "36GB")
    assert code == 4
    assert "3 bits: the fewest that moectl chooses by itself." in out
    assert "hosts like b fit with --split" in err  # the smallest cluster that would
    document = json.loads(plan(capsys, monkeypatch, "--hosts", "a,b,c,d", "--memory", "128GB", "--json")[1])
    assert (document["q_bits"], document["q_bits_chosen"]) == (16, True)


def test_a_quantised_model_keeps_its_bits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("mlx-community/dbrx-instruct-4bit", "--hosts", "a,b,c,d", "--memory", "128GB", "--json")
    document = json.loads(plan(capsys, monkeypatch, *words)[1])
    assert (document["q_bits"], document["q_bits_chosen"]) == (4, False)


def test_hosts_and_this_machine_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    model, wanted = MODELS["databricks/dbrx-instruct"], Wanted(nodes=2)
    hosts = [Host(name, chip="m4-max", memory_bytes=64 << 30) for name in "ab"]
    assert choose_bits_on(hosts, PlanOptions(), say=said.append)(model, wanted) == replace(wanted, bits=4)
    assert choose_bits_on([Host("a"), hosts[1]], PlanOptions(), say=said.append)(model, wanted) == wanted
    node = Node("this machine", Memory(200 << 30), None, 2)
    monkeypatch.setattr("moectl.planner.questions.own_node", lambda: node)
    assert choose_bits_here(said.append)(model, wanted) == replace(wanted, bits=8)
    assert said == [f"{bits} bits: the most that fit; --q-bits sets others." for bits in (4, 8)]


def test_the_model_is_cut_with_the_bits_that_were_chosen(tmp_path: Path) -> None:
    model = str(write_words(write_checkpoint(tmp_path / "tiny", n_layers=1)))
    made = prepare.shard(model, Wanted(nodes=2), choose_bits=lambda model, wanted: replace(wanted, bits=8))
    assert (made.bits, made.directory.name) == (8, "tiny-q8-hidden-2")
