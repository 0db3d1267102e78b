"""Ranks that compute different things notice it; those that do not go on undisturbed."""

from __future__ import annotations

import io
import queue
import struct
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
import tokenizers

from moectl.engine.agreement import check_seen
from moectl.engine.engine import Engine
from moectl.engine.network.fingerprint import take_fingerprint
from moectl.engine.network.witness import Witness, find_dissent
from moectl.engine.protocol import Done, Fatal, Generate, Order, Prefilled, RunOptions, Token
from moectl.engine.request import Request
from moectl.engine.worker import describe_failure
from moectl.errors import RanksDisagree, UsageError, to_json
from moectl.session.session import Session
from moectl.shards.chat.tokenizer import Tokenizer
from tests.engine.test_lockstep import cut_case
from tests.model.test_canary import damage
from tests.session.test_session import specs
from tests.support.alphabet import VOCAB_SIZE, write_tokenizer
from tests.support.families import make_whole
from tests.support.tiny import write_checkpoint

NO_TOKENS = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), eos_token_ids={1})


def words(*pairs: tuple[int, float]) -> list[int]:
    return [word for routing, state in pairs for word in (routing, struct.unpack("i", struct.pack("f", state))[0])]


def test_who_is_alone_is_named() -> None:
    assert find_dissent([]) is None
    assert find_dissent(words((7, 0.5), (7, 0.5))) is None
    assert find_dissent(words((7, 0.5), (7, 0.52), (7, 0.48))) is None  # chips that round differently
    dissent = find_dissent(words((7, 0.5), (8, 0.5), (7, 0.5)))
    assert dissent is not None
    assert (dissent.rank, dissent.what) == (1, "chose other experts")
    dissent = find_dissent(words((7, 0.5), (7, 0.5), (7, -0.5)))
    assert dissent is not None
    assert (dissent.rank, dissent.what) == (2, "computed another state")
    assert find_dissent(words((7, 0.5), (8, 0.5))).rank is None  # type: ignore[union-attr]
    assert find_dissent(words((7, float("nan")), (7, float("nan")))) is not None


def test_the_engine_tells_who_it_is() -> None:
    with pytest.raises(RanksDisagree, match=r"^chose other experts than the others$") as caught:
        check_seen(words((7, 0.5), (7, 0.5), (8, 0.5)))
    assert describe_failure(caught.value) == Fatal(to_json(caught.value), rank=2)
    with pytest.raises(RanksDisagree, match=r"^the ranks chose other experts") as caught:
        check_seen(words((7, 0.5), (8, 0.5)))
    assert describe_failure(caught.value).rank is None


def test_what_is_seen_depends_on_choice_and_state_alone() -> None:
    model = make_whole("mixtral")
    witness = Witness(model)
    tokens = mx.array([[1, 2, 3]])
    mx.eval(model(tokens))
    assert witness.take().tolist() == [0, 0]
    witness.looks = True
    seen = []
    for _ in range(2):
        mx.eval(model(tokens))
        seen.append(witness.take().tolist())
    mx.eval(model(mx.array([[1, 2, 4]])))
    assert seen[0] == seen[1] != witness.take().tolist()
    for order in ([[0, 1], [2, 3]], [[1, 0], [3, 2]], [[2, 3], [0, 1]]):
        witness.see_choice(0, mx.array(order))
        witness.see_state(mx.ones((2, 8)))
        seen.append(witness.take().tolist())
    assert seen[2] == seen[3] != seen[4]


def test_chunks_may_be_longer_than_the_signs() -> None:
    rows = mx.random.normal((9000, 8), key=mx.random.key(1))
    whole = take_fingerprint(rows, 0)
    parts = [take_fingerprint(rows[first : first + 3000], first) for first in (0, 3000, 6000)]
    assert mx.allclose(whole, sum(parts[1:], parts[0]), rtol=1e-3, atol=1e-2).item()
    assert not mx.allclose(whole, take_fingerprint(rows[:4096], 0), rtol=1e-3, atol=1e-2).item()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    return cut_case(source, tmp_path_factory.mktemp("shards") / "two", "hidden", (2, 4), 16)


def ask(shards: Path, *, paranoia: int = 0, agree_routing: bool = False) -> list[int]:
    with Session(specs(shards), RunOptions(paranoia=paranoia, agree_routing=agree_routing)) as session:
        answer = session.generate(Request(1, "hello", 40, ignore_eos=True))
        return [event.token for event in answer if isinstance(event, Token)]


def test_comparing_and_agreeing_change_no_answer(shards: Path) -> None:
    assert ask(shards) == ask(shards, paranoia=1, agree_routing=True)


def test_what_is_seen_of_a_prompt_waits_for_no_later_step() -> None:
    """A chunk's last layer is of no use to the caches; its exchanges would come in no certain order beside others."""
    model = make_whole("mixtral")
    engine = Engine(model, NO_TOKENS, vocab_size=64, max_seq_len=64, prefill_step=8)
    witness = Witness(model)
    engine._agreement._witness, engine._agreement._check_every = witness, 1  # one rank alone has none
    inbox: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
    inbox.put(Generate(Request(1, "", 4, prompt_tokens=tuple(range(30)))))
    serving = engine.serve(inbox)
    assert isinstance(next(serving), Prefilled)
    seen = [*witness._routing, *witness._states]
    assert len(seen) == len(model.layers) + 1
    assert count_lazy(seen) == 0
    witness.take()
    mx.eval(model(mx.array([[1]])))
    witness.looks = True
    model(mx.array([[1]]))
    assert count_lazy(witness._states) > 0


def count_lazy(arrays: list[mx.array]) -> int:
    """Return how many operations have still to be done for these arrays."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")


def test_a_rank_that_goes_astray_is_stopped(shards: Path, tmp_path: Path) -> None:
    astray = damage(shards, tmp_path / "astray", "common/layer-001.safetensors")
    first, second = specs(shards)
    with (
        Session([first, replace(second, shards=str(astray))], RunOptions(paranoia=4)) as session,
        pytest.raises(RanksDisagree, match=r"the ranks (chose other experts|computed another state)") as caught,
    ):
        list(session.generate(Request(1, "hello", 100, ignore_eos=True)))
    assert caught.value.exit_code == 6


def test_a_pipeline_has_nothing_to_compare(shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, vocab_size=VOCAB_SIZE)
    write_tokenizer(source)
    directory = cut_case(source, tmp_path / "layers", "layers", (1, 1), 16)
    with (
        pytest.raises(UsageError, match="each computes its own layers") as caught,
        Session(specs(directory), RunOptions(paranoia=4)),
    ):
        pass
    assert caught.value.hint == "leave it out: the canary at the start checks them"
    with Session(specs(directory)) as session:
        assert isinstance(list(session.generate(Request(1, "hello", 4)))[-1], Done)
