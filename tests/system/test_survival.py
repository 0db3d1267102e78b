"""Workers and controllers that die or freeze while they answer: what is streamed stays the undisturbed answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from moectl.server.client import Client, find_running
from tests.support.metal import Modes
from tests.support.ring import process_env
from tests.support.running import wait_for, workers

GREEDY: dict[str, Any] = {"prompt": "Expert", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 1.5, "seed": 7}


class Served:
    """`moectl serve` on two local ranks, slow enough to be hit in the middle of an answer; `modes`: in a Mac's ways."""

    def __init__(self, *words: str, modes: Modes | None = None) -> None:
        program = "moectl" if modes is None else "tests.support.metal"
        # In float32 also as on a GPU: in bfloat16 a restart, which reads the answer as a prompt, may tip a tie.
        words += ("--dtype", "float32") if modes else ()
        command = [sys.executable, "-m", program, "serve", "--local", "2", "--port", "0", "--json", *words]
        env = process_env(RING_DELAY_US="1500", **(modes.env() if modes else {}))
        pipe = subprocess.PIPE
        self.modes = modes
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.http = httpx2.Client(base_url=json.loads(line)["url"].removesuffix("/v1"), timeout=120)

    def stream(self, fields: dict[str, Any], *, act: Callable[[], None] | None = None, after: int = 20) -> Streamed:
        """Ask, and `act` once so many pieces of the answer have come."""
        found = Streamed()
        with self.http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
            for line in response.iter_lines():
                found.take(line)
                if act is not None and len(found.pieces) == after:
                    act()
                    act = None
        return found

    def workers(self) -> list[int]:
        """Return the pids of its ranks, in no order."""
        rows = subprocess.run(["ps", "-ewwo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
        fields = [row.split(None, 3) for row in rows.splitlines()[1:]]
        mine = [f for f in fields if int(f[1]) == self.process.pid and "moectl worker" in f[3] and "Z" not in f[2]]
        return [int(f[0]) for f in mine]

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/health").json()
        return found

    def end(self) -> tuple[int, str]:
        """Return the exit code and what was said."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        _, stderr = self.process.communicate(timeout=60)
        wait_for(lambda: not self.workers())
        return self.process.returncode, stderr


class Streamed:
    """What came of a streamed completion."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.notices: list[str] = []
        self.error: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.stats: dict[str, Any] = {}

    def take(self, line: str) -> None:
        if line.startswith(": moectl: "):
            self.notices.append(line.removeprefix(": moectl: "))
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            self.error = chunk.get("error", self.error)
            for choice in chunk.get("choices", []):
                self.pieces.append(choice["text"])
                self.finish_reason = choice["finish_reason"] or self.finish_reason
                self.stats = choice.get("stats") or self.stats

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="plain"),
        pytest.param(Modes(gpu=True), marks=pytest.mark.long, id="gpu"),
        pytest.param(Modes(streams=True, watch_s=5.0), marks=pytest.mark.long, id="streams"),
    ],
)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served("--max-restarts", "100", modes=request.param)
    yield served
    code, stderr = served.end()
    assert code == 130, stderr


@pytest.fixture(scope="module")
def undisturbed(served: Served) -> dict[str, str]:
    found = {name: served.stream(fields) for name, fields in (("greedy", GREEDY), ("seeded", SEEDED))}
    assert all(one.finish_reason == "length" and not one.notices for one in found.values())
    assert found["greedy"].text != found["seeded"].text
    return {name: one.text for name, one in found.items()}


def kill(served: Served, number: signal.Signals, which: int) -> Callable[[], None]:
    return lambda: os.kill(sorted(served.workers())[which], number)


@pytest.mark.parametrize(
    ("number", "cause", "which"),
    [
        (signal.SIGKILL, "the worker was killed by signal 9 while generating", 0),
        pytest.param(
            signal.SIGKILL, "the worker was killed by signal 9 while generating", 1, marks=pytest.mark.long
        ),  # who asks meanwhile waits for it as well
        (signal.SIGSTOP, "the worker has not answered for 4 s", 1),
    ],
)
def test_an_answer_goes_on(
    served: Served, undisturbed: dict[str, str], number: signal.Signals, cause: str, which: int
) -> None:
    before = served.health()["restarts"]
    fields, name = (GREEDY, "greedy") if which else (SEEDED, "seeded")
    found = served.stream(fields, act=kill(served, number, which))
    assert found.error is None
    assert found.text == undisturbed[name]
    assert found.finish_reason == "length"
    assert found.stats["completion_tokens"] == GREEDY["max_tokens"]
    assert cause in found.notices[0]
    assert "Starting again" in found.notices[0]
    assert "the answer goes on" in found.notices[-1]
    health = served.health()
    assert (health["restarts"], health["status"]) == (before + 1, "ok")
    assert len(served.workers()) == 2


def test_who_asks_meanwhile_waits(served: Served, undisturbed: dict[str, str]) -> None:
    late: list[Streamed] = []
    asking = threading.Thread(target=lambda: late.append(served.stream(GREEDY)))

    def act() -> None:
        kill(served, signal.SIGKILL, 1)()
        wait_for(lambda: served.health()["status"] == "unhealthy")
        asking.start()

    assert served.stream(GREEDY, act=act).text == undisturbed["greedy"]
    asking.join(60)
    assert late[0].text == undisturbed["greedy"]


def test_a_controller_that_was_stopped_blames_no_worker(served: Served, undisturbed: dict[str, str]) -> None:
    served = Served(modes=served.modes)

    def sleep() -> None:
        os.kill(served.process.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(served.process.pid, signal.SIGCONT)

    # The workers go after 3 s, which may be enough for the whole answer.
    assert served.stream(GREEDY, act=sleep).text == undisturbed["greedy"]
    wait_for(lambda: served.health()["restarts"] == 1)
    _, stderr = served.end()
    assert "this machine slept, or was stopped, for" in stderr


def test_a_short_stop_is_nothing(served: Served, undisturbed: dict[str, str]) -> None:
    def freeze(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)

    before = served.health()["restarts"]
    assert served.stream(GREEDY, act=lambda: freeze(served.workers()[0])).text == undisturbed["greedy"]
    assert served.stream(GREEDY, act=lambda: freeze(served.process.pid)).text == undisturbed["greedy"]
    assert served.health()["restarts"] == before


def test_without_restarts_there_is_one_clear_error() -> None:
    served = Served("--no-restart")
    found = served.stream(GREEDY, act=kill(served, signal.SIGKILL, 1))
    assert found.error is not None
    said = "localhost: rank 1: the worker was killed by signal 9 while generating"
    assert found.error["message"] == f"{said} (hint: {found.error['hint']})"
    assert not found.notices
    code, stderr = served.end()
    assert code == 6
    assert "rank 1: the worker was killed by signal 9" in stderr


def test_a_controller_that_dies_takes_its_workers_with_it() -> None:
    command = [sys.executable, "-m", "moectl", "run", "--local", "2", "--raw", "Expert", "--max-tokens", "2000"]
    env = process_env(RING_DELAY_US="5000", MOECTL_RUN_KEEP_ALIVE="1m")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(1)
        [path] = find_running()
        os.kill(Client(path).describe()["pid"], signal.SIGKILL)
        _, stderr = asking.communicate(timeout=30)
    assert asking.returncode == 6
    assert "the controller has gone" in stderr
    wait_for(lambda: not workers())


@pytest.mark.long
def test_a_frozen_controller_keeps_nobody_waiting() -> None:
    run = [sys.executable, "-m", "moectl", "run", "--local", "2", "--raw", "Expert", "--max-tokens", "2000"]
    env = process_env(RING_DELAY_US="5000", MOECTL_RUN_KEEP_ALIVE="1m")
    with subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(1)
        [path] = find_running()
        os.kill(Client(path).describe()["pid"], signal.SIGSTOP)
        late = subprocess.run(run, env=env, capture_output=True, text=True, timeout=100)
        _, stderr = asking.communicate(timeout=100)
    for code, said in ((late.returncode, late.stderr), (asking.returncode, stderr)):
        assert code == 8
        assert "the controller does not answer" in said
        assert "moectl stop --now" in said
    stop = [sys.executable, "-m", "moectl", "stop", "--now"]
    stopped = subprocess.run(stop, env=env, capture_output=True, text=True, timeout=100)
    assert (stopped.returncode, stopped.stdout) == (0, "Stopped a controller that was not answering.\n")
    assert not find_running()
    wait_for(lambda: not workers())
