"""Many clients for many minutes on two local ranks, through the API: `python -m tests.benchmarks.bench_load`.

Conversations of different lengths, sampled and greedy, some cancelled in the middle; none begins as another, because a
prompt that the cache knows costs next to nothing. At the end, untimed, greedy answers have to come again as they were.
Prints requests, errors, tokens per second, time to first token, and each rank's memory
over time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import Any

import httpx2
import openai

from tests.support.ring import process_env

QUESTIONS = (
    "What is expert parallelism?",
    "Who are you?",
    "What is a mixture of experts?",
    "What is an all-reduce?",
    "Say goodbye.",
    "How many experts work on one token?",
)


class Load:
    """What all clients share."""

    def __init__(self, url: str, model: str, seconds: float) -> None:
        self.api = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        self.model = model
        self.end_s = time.monotonic() + seconds
        self.known: list[tuple[list[dict[str, str]], str]] = []  # greedy conversations and their answers
        self.numbers = itertools.count(random.SystemRandom().randrange(10**9))
        self.done = self.cancelled = self.tokens = 0
        self.first_s: list[float] = []
        self.errors: list[str] = []

    async def client(self, seed: int) -> None:
        """Ask until the time is up."""
        dice = random.Random(seed)
        while time.monotonic() < self.end_s:
            try:
                await self.ask(dice)
            except (openai.OpenAIError, AssertionError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")

    async def ask(self, dice: random.Random) -> None:
        """Ask one question, in one of several ways."""
        question = dice.choice(QUESTIONS)
        greedy, cancels = dice.random() < 0.6, dice.random() < 0.15
        # The number comes first, so that the cache knows none of it, and backwards, so that its first digit differs.
        name = str(next(self.numbers))[::-1]
        messages = [{"role": "system", "content": name}, {"role": "user", "content": question}]
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": dice.randint(5, 60) if not greedy else 60,
            "temperature": 0 if greedy else 0.8,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin, text = time.monotonic(), ""
        async with await self.api.chat.completions.create(**asked) as stream:
            async for chunk in stream:
                if chunk.usage is not None:
                    self.tokens += chunk.usage.completion_tokens
                    details = chunk.usage.prompt_tokens_details
                    assert details is not None, "the answer does not say how much of its prompt was cached"
                    assert details.cached_tokens == 0, f"{details.cached_tokens} tokens came from the prompt cache"
                if chunk.choices and chunk.choices[0].delta.content:
                    if not text:
                        self.first_s.append(time.monotonic() - begin)
                    text += chunk.choices[0].delta.content
                    if cancels and len(text) > 20:
                        self.cancelled += 1
                        return
        if greedy:
            self.known.append((messages, text))
        self.done += 1

    async def ask_again(self) -> None:
        """Ask some of the greedy questions again, and note whose answer is another."""
        for messages, text in self.known[-20:]:
            asked: Any = {"model": self.model, "messages": messages, "max_tokens": 60, "temperature": 0}
            answer = (await self.api.chat.completions.create(**asked)).choices[0].message.content
            if answer != text:
                self.errors.append(f"{messages!r} has another answer now")


async def watch(url: str, load: Load, every_s: float) -> list[tuple[float, list[int], bool]]:
    """Return (minute, bytes per rank, healthy) now and then, until the time is up."""
    seen = []
    async with httpx2.AsyncClient(base_url=url.removesuffix("/v1")) as http:
        begin = time.monotonic()
        while time.monotonic() < load.end_s:
            found = (await http.get("/health")).json()
            seen.append(((time.monotonic() - begin) / 60, found["memory_bytes"], found["status"] == "ok"))
            await asyncio.sleep(every_s)
    return seen


async def run(url: str, model: str, clients: int, seconds: float) -> Load:
    """Load the server; print what came of it."""
    load = Load(url, model, seconds)
    begin = time.monotonic()
    watching = asyncio.create_task(watch(url, load, seconds / 12))
    await asyncio.gather(*(load.client(seed) for seed in range(clients)))
    spent = time.monotonic() - begin
    await load.ask_again()
    for minute, memory, healthy in await watching:
        sizes = " ".join(f"{size / 1e6:7.1f}" for size in memory)
        print(f"minute {minute:5.1f}  {sizes} MB  {'healthy' if healthy else 'NOT HEALTHY'}")
    first = statistics.quantiles(load.first_s, n=20)
    print(
        f"{clients} clients, {spent:.0f} s: {load.done} answers, {load.cancelled} cancelled, "
        f"{len(load.errors)} errors, {load.tokens / spent:.0f} tok/s; "
        f"first token {first[9]:.2f} s (median), {first[18]:.2f} s (95 %)"
    )
    for error in sorted(set(load.errors)):
        print(f"{load.errors.count(error)} × {error}")
    return load


def main() -> None:
    """Start a server, load it, end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    command = [sys.executable, "-m", "moectl", "serve", "--local", str(options.ranks), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=process_env(), text=True) as server:
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        try:
            load = asyncio.run(run(found["url"], found["model"], options.clients, 60 * options.minutes))
        finally:
            server.terminate()
    sys.exit(bool(load.errors))


if __name__ == "__main__":
    os.environ.setdefault("MOECTL_RUN_KEEP_ALIVE", "0")
    main()
