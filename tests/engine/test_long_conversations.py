"""Agents that take turns: each computes only what is new, for every kind of cache, and answers as computed anew."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from moectl.shards.chat.tokenizer import Tokenizer, open_tokenizer
from tests.engine.test_engine_families import drive, whole
from tests.support.alphabet import write_tokenizer
from tests.support.driven import Driven

pytestmark = pytest.mark.usefixtures("uncompiled")

# It thinks before each answer, and the next turn does not have what it thought.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }};\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
)
TAIL = len("<think>")
SYSTEM = {"role": "system", "content": "You have tools, and you use them."}
SAID = 6
# Keys and values, linear attention; MLA, a window, a state space, chunks (one row at a time).
MORE = ("deepseek_v32", "gpt_oss", "mamba2", "llama4")
KINDS = ("llama", "qwen3_next", *(pytest.param(family, marks=pytest.mark.long) for family in MORE))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": THINKING}))
    return open_tokenizer(directory)


class Agent:
    """A conversation, whose answers come back in other words than the model's own."""

    def __init__(self, driven: Driven, question: str) -> None:
        self.driven = driven
        self.messages: list[dict[str, Any]] = [SYSTEM, {"role": "user", "content": question}]
        self.number = 0

    def ask(self, max_tokens: int = SAID, **more: Any) -> int:
        """Order the next answer; return how many tokens the prompt has."""
        self.number = self.driven.ask("", max_tokens, messages=tuple(self.messages), ignore_eos=True, **more)
        return len(self.driven.tokenizer.encode_chat(self.messages))

    def call(self) -> None:
        function = {"name": "look", "arguments": {}}
        calls = [{"id": "1", "type": "function", "function": function}]
        self.messages.append({"role": "assistant", "content": "I look.", "tool_calls": calls})
        self.messages.append({"role": "tool", "tool_call_id": "1", "content": "Line after line."})

    def go_on(self, question: str) -> None:
        self.messages += [{"role": "assistant", "content": "So it is."}, {"role": "user", "content": question}]

    @property
    def cached(self) -> int:
        return self.driven.stats(self.number).cached_tokens


@cache
def alone(family: str, tokenizer: Tokenizer, told: str) -> list[int]:
    """Return an answer of an engine that knows nothing."""
    agent = Agent(drive(family, tokenizer), "")
    agent.messages = json.loads(told)
    agent.ask()
    agent.driven.run()
    return agent.driven.tokens(1)


@pytest.mark.parametrize("family", KINDS)
def test_agents_that_take_turns_compute_what_is_new(family: str, tokenizer: Tokenizer) -> None:
    driven = drive(family, tokenizer, cache_tokens=4096)
    one, two = Agent(driven, "What is in the file?"), Agent(driven, "Write a poem.")
    known = dict.fromkeys((one, two), 0)

    def turn(*agents: Agent) -> None:
        lengths = {agent: agent.ask() for agent in agents}
        driven.run()
        for agent, length in lengths.items():
            assert agent.cached >= known[agent]
            assert driven.tokens(agent.number) == alone(family, tokenizer, json.dumps(agent.messages))
            known[agent] = length - TAIL

    turn(one)
    assert one.cached == 0
    known[two] = len(tokenizer.encode_chat([SYSTEM])) - len("assistant") - TAIL
    turn(two)
    for agent in (one, two, one):  # the tools' loop
        agent.call()
        turn(agent)
    one.go_on("And then?")
    two.go_on("Why?")
    turn(one, two)  # in a batch, where the model takes one
    answer = driven.tokens(two.number)
    two.ask(answered=tuple(answer[:3]))  # after a restart
    driven.run()
    assert driven.tokens(two.number) == answer[3:]


def test_agents_with_long_limits_do_not_drive_each_other_out(tokenizer: Tokenizer) -> None:
    """An answer that may be as long as the memory has room does not take that room before it is needed."""
    driven = Driven((whole("llama"), tokenizer), vocab_size=512, max_seq_len=2048, kv_tokens=2048)
    one, two = Agent(driven, "What is in the file?" * 9), Agent(driven, "Write a poem." * 9)
    lengths = []
    for turn in range(3):
        for agent in (one, two):
            lengths.append(agent.ask(32_000))
            cancel(driven, agent.number)
            assert turn == 0 or agent.cached >= lengths[-3] - TAIL
            agent.call()


def cancel(driven: Driven, number: int, after: int = 6) -> None:
    """Run until an answer has a few tokens, then cancel it."""
    begin = driven.steps
    driven.on_step = lambda: driven.cancel(number) if driven.steps == begin + after else None
    driven.run()


def test_what_is_kept_makes_way_for_rows_that_grow(tokenizer: Tokenizer) -> None:
    driven = Driven((whole("llama"), tokenizer), vocab_size=512, max_seq_len=768, kv_tokens=768)
    Agent(driven, "What is in the file?" * 5).ask()
    driven.run()
    kept = driven.engine._cache.tokens
    assert kept > 150
    number, seen = driven.ask("x", 700, ignore_eos=True), []

    def watch() -> None:
        rows = [len(answer.tokens) + answer.heard for answer in driven.engine._running.values()]
        seen.append(driven.engine._cache.tokens)
        assert sum(rows) + seen[-1] <= 768
        if sum(rows) > 260:
            driven.cancel(number)

    driven.on_step = watch
    driven.run()
    assert seen[5] == kept
    assert seen[-1] == 0


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_spaces_have_caches_of_their_own(family: str, tokenizer: Tokenizer) -> None:
    driven = drive(family, tokenizer)
    cached = []
    for space in (1, 2, 1, 2):
        agent = Agent(driven, "What is in the file?")
        agent.ask(space=space)
        driven.run()
        cached.append(agent.cached)
    assert cached[:2] == [0, 0]
    assert cached[2] == cached[3] > 80
